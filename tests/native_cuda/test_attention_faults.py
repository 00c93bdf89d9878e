"""The tests of attention notice what breaks its kernels. `just cuda-check` tries every fault, the sanitizers' included;
here a few."""

from __future__ import annotations

import sys
from pathlib import Path

from blade_native.cuda import attention_kernels
from blade_native.cuda.attention_kernels import AttentionKernels, Shape
from blade_native.cuda.launch import SOURCES, Launcher
from blade_native.emulator.faults import Fault, Redirected, Suite

sys.path.append(str(Path(__file__).parents[1]))  # where this file is loaded by its path

from native_cuda.attention_world import BF16, INT8, World, attention, check

SHAPES = Shape(BF16, None, 64), Shape(BF16, INT8, 64)


def run_decode(launcher: Launcher, source: Path) -> None:
    """Four sequences, one of them of two chunks that one block of threads does; with and without a window."""
    kernels = AttentionKernels(Redirected(launcher, source))
    kernels.add(SHAPES)
    for shape, window in zip(SHAPES, (None, 20), strict=True):
        check(World(attention(kernels, 1), shape, (8, 2), [300, 41, 17, 3]), [1, 4, 1, 1], window)


def run_prefill(launcher: Launcher, source: Path) -> None:
    kernels = AttentionKernels(Redirected(launcher, source))
    kernels.add(SHAPES)
    for shape, window in zip(SHAPES, (None, 50), strict=True):
        check(World(attention(kernels, 1), shape, (4, 1), [300, 41, 150]), [12, 40, 33], window)


def run_trees(launcher: Launcher, source: Path) -> None:
    """Windows within the trees, and one that begins 74 keys before; chains beside other paths, far behind places."""
    kernels = AttentionKernels(Redirected(launcher, source))
    kernels.add(SHAPES[:1], attention_kernels.TREES)
    parents = [[*range(-1, 15), -1, *range(16, 46)], [-1, -1, *range(28)]]
    trees = dict(enumerate(parents))
    for window in (None, 6, 60):
        check(World(attention(kernels, 1), SHAPES[0], (2, 1), [138, 40, 60], trees=trees), [48, 31, 20], window)


def run_store(launcher: Launcher, source: Path) -> None:
    """Some tokens on top of a past, a prompt from its start, and a sequence of one token, also without the prompt."""
    kernels = AttentionKernels(Redirected(launcher, source))
    shape = Shape(BF16, INT8, 80)
    kernels.add([shape])
    for kv_lens, owed in (([20, 9, 1], [3, 9, 1]), ([20, 1], [1, 1])):
        check(World(attention(kernels, 1), shape, (2, 1), kv_lens), owed)


SHARED_BY_BOTH = [
    Fault("no wait", "ptx::cp_async_wait<STAGES - 2>();", "", "result"),
    Fault("a wait off by one", "ptx::cp_async_wait<STAGES - 2>();", "ptx::cp_async_wait<STAGES - 1>();", "result"),
    Fault(
        "values past the end",
        "ptx::cp_async16(to + Stage::VALUES, values + i * STEP, r < num_valid);",
        "ptx::cp_async16(to + Stage::VALUES, values + i * STEP, true);",
        "result",
    ),
    Fault("a window off by one", "max(0, position + 1 - reach)", "max(0, position - reach)", "result"),
    Fault("weights without the scale of values", "a = a == 0.f ? 0.f : a * factor.x;", "", "result"),
    Fault("sums not rescaled", "      l[h] *= shrink[h];\n", "", "result"),
    Fault("scores of the wrong rows", "tile & 1 : tile >> 1) * 8", "tile >> 1 : tile & 1) * 8", "result"),
]
DECODE = Suite(
    SOURCES / "paged_decode.cu",
    run_decode,
    [
        *SHARED_BY_BOTH,
        Fault(
            "one key too many",
            "row < seq.num_rows ? start + query + 1 : 0",
            "row < seq.num_rows ? start + query + 2 : 0",
            "result",
        ),
        Fault(
            "a short ring",
            "const unsigned char* stage = ring + tile %",
            "const unsigned char* stage = ring + (tile + 1) %",
            "result",
        ),
        Fault("lanes that do not wait", "      __syncwarp();  // what every", "      // what every", "thread"),
        Fault("results over rings", "  __syncthreads();  // the rings become", "  // the rings become", "thread"),
        Fault("rings over results", "  __syncthreads();  // and rings", "  // and rings", "thread"),
        Fault("sums past the end", "(results + WARPS * 16 * (D + 8))", "(results + WARPS * 32 * (D + 8))", "address"),
    ],
)
PREFILL = Suite(
    SOURCES / "paged_prefill.cu",
    run_prefill,
    [
        *SHARED_BY_BOTH,
        Fault("not causal", "row < seq.num_rows ? start + query + 1 : 0", "seq.context", "result"),
        Fault(
            "a short ring",
            "const unsigned char* stage = shared + tile %",
            "const unsigned char* stage = shared + (tile + 1) %",
            "result",
        ),
        Fault("warps that do not wait", "    __syncthreads();  // what all copied", "    // what all copied", "thread"),
        Fault("results over the ring", "  __syncthreads();  // the ring becomes", "  // the ring becomes", "thread"),
        Fault("keys of another share", "stage, warp * SHARE);", "stage, 0);", "result"),
    ],
)
STORE = Suite(
    SOURCES / "kv_store.cu",
    run_store,
    [
        Fault("queries as they are", "  if (RELATED<S> && is_q) x.transform(lane);\n", "", "result"),
        Fault("keys as they are", "      relate(x, args, head, token, lane);\n", "", "result"),
        Fault("an origin of another sequence", "cu_seqlens[middle] <= token", "cu_seqlens[middle] < token", "result"),
        Fault("no origin for a lone first token", "args.phase != REST) {", "args.phase == ORIGINS) {", "result"),
        Fault("codes that do not fit", "largest / 127.f", "largest / 150.f", "result"),
        Fault(
            "channels past the end",
            "      if (d >= D) continue;\n      const Two<S> stored = {",
            "      const Two<S> stored = {",
            "address",
        ),
    ],
)
TREES = Suite(
    SOURCES / "paged_prefill.cu",
    run_trees,
    [
        Fault("a mask off by one", "key + t * 2 - start)", "key + t * 2 - start + 1)", "result"),
        Fault("keys of all paths", "return {from, start, path};", "return plain;", "result"),
        Fault("reach by places", "start + __popcll(path) - 1", "start + query", "result"),
        Fault("ancestors out of reach", "position < from; ++position", "position < start; ++position", "result"),
        Fault("bits after the last", "first >= 64 || first <= -64", "false", "undefined"),
        Fault("rows that begin late", "in_tree ? first_position : position(row)", "position(row)", "result"),
    ],
)
QUICK = ("values past the end",)


def test_faults_in_trees_are_caught() -> None:
    assert TREES.survivors(("a mask off by one",)) == []


def test_faults_in_the_store_are_caught() -> None:
    assert STORE.survivors(("keys as they are",)) == []


def test_faults_in_decode_are_caught() -> None:
    assert DECODE.survivors(QUICK) == []
