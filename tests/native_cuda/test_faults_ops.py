"""Faults in the kernels of the op set, each noticed by what is named; `just cuda-check` tries all of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from blade import GroupedWeight
from blade_native.cuda.launch import SOURCES, Launcher
from blade_native.cuda.linear import Device, LinearKernels, PackedLinear
from blade_native.cuda.packing import pack
from blade_native.cuda.rows import RowKernels
from blade_native.cuda.selection import DeltaKernels, SelectKernels
from blade_native.emulator.faults import Fault, Redirected, Suite
from blade_native.reference import TorchOps, TorchQuantizedLinear, delta_step, top_k

pytestmark = pytest.mark.timeout(600)  # whoever comes first waits for the compiler
TWIN = TorchOps()


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def run_linear(launcher: Launcher, source: Path) -> None:
    n, k, group = 144, 640, 32
    q = torch.randint(0, 16, (n, k), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    scales = random(n, k // group).abs().half()
    weight = GroupedWeight(4, group, q, scales, minima=-8 * scales)
    kernels = LinearKernels(Redirected(launcher, source), Device())
    linear = PackedLinear(kernels, [pack(weight, torch.device("cpu"))], None, torch.bfloat16)
    for num_rows in (3, 18, 18):
        x = random(num_rows, k).bfloat16()
        expected = TorchQuantizedLinear([weight], None)(x.float())
        torch.testing.assert_close(linear(x, torch.float32), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def run_rows(launcher: Launcher, source: Path) -> None:
    kernels = RowKernels(Redirected(launcher, source))
    x, residual, weight = random(3, 2048), random(4, 2048)[:3], random(2048)
    expected, total = TWIN.add_rms_norm(x, residual.clone(), weight, 1e-6)
    torch.testing.assert_close(kernels.add_norm(x, residual, weight, 1e-6), expected)
    torch.testing.assert_close(residual, total)


def run_select(launcher: Launcher, source: Path) -> None:
    kernels = SelectKernels(Redirected(launcher, source))
    x = random(2, 9001).round(decimals=2)
    for found, expected in zip(
        (*kernels.top_k(x, 50), *kernels.peaks(x)), (*top_k(x, 50), *TWIN.peaks(x)), strict=True
    ):
        torch.testing.assert_close(found, expected)


def run_delta(launcher: Launcher, source: Path) -> None:
    q, k, v, state = random(2, 1, 64), random(2, 1, 64) + 1, random(2, 2, 32), random(3, 2, 64, 32)
    g, beta, slots = -random(2, 2).abs(), random(2, 2).sigmoid(), torch.tensor([2, 0], dtype=torch.int32)
    kernels = DeltaKernels(Redirected(launcher, source), torch.float32, 64)
    twin_state = state.clone()
    expected = delta_step(q, k, v, g, beta, twin_state, slots)
    torch.testing.assert_close(kernels.step(q, k, v, g, beta, state, slots), expected)
    torch.testing.assert_close(state, twin_state)


LINEAR = Suite(
    SOURCES / "linear.cu",
    run_linear,
    [
        Fault("a wait too short", "R::STAGES - 2 - R::SHARED_TOTALS", "R::STAGES - 1 - R::SHARED_TOTALS", "result"),
        Fault(
            "stages are not waited for",
            "    __syncthreads();  // the stage is there",
            "    // the stage is there",
            "thread",
        ),
        Fault("counters keep counting", "  if (threadIdx.x == 0) args.arrived[counter] = 0;\n", "", "result"),
        Fault("a slice is left out", "first + j < num_slices", "first + j < num_slices - 1", "result"),
        Fault(
            "channels beyond the last",
            "channel >= args.num_out) continue;\n    const float sum",
            "channel > args.num_out) continue;\n    const float sum",
            "result",
        ),
        Fault(
            "a stage too many",
            "tile < num_tiles && at / F::GROUP_BYTES * GROUP < left;",
            "tile < num_tiles;",
            "address",
        ),
        Fault("x beyond the slice", "from, valid)", "from, true)", "result"),
        Fault("sums of x of another stage", "(odd ^ 1) * R::TOTALS", "odd * R::TOTALS", "result"),
        Fault("x unpadded", "X_ROW = STAGE + 8;", "X_ROW = STAGE + 4;", "report"),
    ],
)
ROWS = Suite(
    SOURCES / "rows.cu",
    run_rows,
    [
        Fault("sums of warps not waited for", "    __syncthreads();\n    x = 0.f;", "    x = 0.f;", "result"),
        Fault("a vector too many", "args.width / N : 0;", "args.width / N + 1 : 0;", "address"),
    ],
)
SELECT = Suite(
    SOURCES / "select.cu",
    run_select,
    [
        Fault(
            "bins not waited for",
            "    __syncthreads();\n    if (threadIdx.x < 32) {",
            "    if (threadIdx.x < 32) {",
            "report",  # a prefix that no key has leads past the histogram
        ),
        Fault(
            "warps not waited for",
            "  __syncthreads();\n  if (threadIdx.x >= 32) return;",
            "  if (threadIdx.x >= 32) return;",
            "result",
        ),
        Fault("sort without barriers", "step; step >>= 1) {\n      __syncthreads();", "step; step >>= 1) {", "result"),
        Fault("too little room", "unsigned long long best[MAX_K];", "unsigned long long best[32];", "report"),
        Fault(
            "reads beyond the row", "held[i] = id < args.width ? row[id] : NEG_INF;", "held[i] = row[id];", "address"
        ),
    ],
)
DELTA = Suite(
    SOURCES / "delta_net.cu",
    run_delta,
    [
        Fault("q and k not waited for", "  __syncthreads();\n\n  const float decay", "  const float decay", "result"),
        Fault("column sums not waited for", "  __syncthreads();\n  float4 sum =", "  float4 sum =", "result"),
        Fault("one scratch for two sums", "column_sum(answer, scratch[1])", "column_sum(answer, scratch[0])", "thread"),
    ],
)


@pytest.mark.parametrize(
    ("suite", "name"),
    [(LINEAR, "a wait too short"), (ROWS, "sums of warps not waited for"), (DELTA, "q and k not waited for")],
    ids=["linear", "rows", "delta"],
)
def test_faults_are_caught(suite: Suite, name: str) -> None:
    assert suite.survivors([name]) == []
