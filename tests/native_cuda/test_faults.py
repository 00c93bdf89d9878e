"""The emulator catches what breaks kernels: each fault below is noticed by what its author would look at.

`just cuda-check` tries all of them, under the sanitizers too; the tests here a few.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from blade_native.emulator.faults import Fault, Suite, under_sanitizer

if TYPE_CHECKING:
    from blade_native.cuda.launch import Launcher

LOOP_BARRIER = "    __syncthreads();  // the copies of all are there, and the place of the step before is free\n"
TILE_BARRIER = "  __syncthreads();  // the tile is whole\n"
WAIT = "ptx::cp_async_wait<STAGES - 2>();"
STORE = "tile[lane / 4 + i / 2 * 8][warp * 8 + lane % 4 * 2 + i % 2] = sum[i];"


def run(launcher: Launcher, source: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    m, n, k = 32, 32, 96
    a = torch.randn(m, k, generator=generator).half()
    b = torch.randn(k, n, generator=generator).half()
    c = torch.empty(m, n)
    expression = "matmul<__half, 3>"
    kernel = launcher.load(source, [expression]).kernel(expression, shared_bytes=3 * 2 * 16 * 16 * 2)
    kernel((n // 16, m // 16), (64,), c=c, a=a, b=b, n=n, k=k)
    assert torch.allclose(c, a.float() @ b.float(), atol=1e-4)


MATMUL = Suite(
    Path(__file__).parent / "kernels/matmul.cu",
    run,
    [
        Fault("no wait", WAIT, "", "result"),
        Fault("a wait off by one", WAIT, "ptx::cp_async_wait<STAGES - 1>();", "result"),
        Fault(
            "a copy started one step early",
            "load(step + STAGES - 1);\n    const",
            "load(step + STAGES);\n    const",
            "result",
        ),
        Fault("a ring one stage short", "(step % STAGES * 2", "(step % (STAGES - 1) * 2", "result"),
        Fault("no barrier before the epilogue", TILE_BARRIER, "", "result"),
        Fault("wrong lanes", "b[warp * 2], b[warp * 2 + 1]", "b[0], b[1]", "result"),
        Fault("a barrier for one warp", TILE_BARRIER, "  if (warp) __syncthreads();\n", "report"),
        Fault(
            "a barrier in two places",
            TILE_BARRIER,
            "  if (warp)\n  __syncthreads();\n  else\n  __syncthreads();\n",
            "report",
        ),
        Fault(
            "a shuffle under divergence",
            TILE_BARRIER,
            TILE_BARRIER + "  if (lane) __shfl_sync(FULL_WARP, lane, 0);\n  __syncwarp();\n",
            "report",
        ),
        Fault("a copy to an odd address", "+ place(row, half);", "+ place(row, half) + 1;", "report"),
        Fault(
            "a misaligned vector",
            STORE,
            "*reinterpret_cast<float4*>(args.c + 1) = make_float4(sum[i], 0, 0, 0);",
            "report",
        ),
        Fault("a wild pointer", STORE, "args.c[1ll << 40] = 0;", "report"),
        Fault("an endless loop", TILE_BARRIER, "  for (volatile int i = 0; !i;) {}\n", "report"),
        Fault("copies never waited for", "  ptx::cp_async_wait<0>();\n", "  load(0);\n", "report"),
        Fault("no barrier in the loop", LOOP_BARRIER, "", "thread"),
        Fault("a barrier too few, result right", TILE_BARRIER, "  __syncwarp();\n", "thread"),
        Fault("a short tile", "tile[16][16 + 1]", "tile[15][16 + 1]", "report"),
        Fault("past the static tile", STORE, "(&tile[0][0])[i ? lane : 272] = sum[i];", "address"),
        Fault("a short ring", "+ (step % STAGES * 2", "+ 8 + (step % STAGES * 2", "address"),
        Fault("one element past a tensor", "args.c[(m0", "args.c[1 + (m0", "address"),
        Fault("a shift out of range", "threadIdx.x, lane", "threadIdx.x << (args.k - 64), lane", "undefined"),
    ],
)


QUICK = ("no wait", "no barrier before the epilogue", "a barrier for one warp", "a misaligned vector")


def test_faults_are_caught() -> None:
    assert MATMUL.survivors(QUICK) == []


@pytest.mark.timeout(600)  # a compiler and a second Python run in it
@pytest.mark.parametrize("name", ["a barrier too few, result right"])
def test_a_sanitizer_catches_what_the_result_hides(name: str) -> None:
    report = under_sanitizer(f"{__file__}:MATMUL", name, "thread")
    assert report is not None
    assert "data race" in report
