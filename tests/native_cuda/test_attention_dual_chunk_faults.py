"""The tests of dual chunk attention notice what breaks its kernels: see test_attention_faults.py."""

from __future__ import annotations

import sys
from pathlib import Path

from blade import DualChunks
from blade_native.cuda.attention_kernels import DUAL, AttentionKernels, Shape
from blade_native.cuda.launch import SOURCES, Launcher
from blade_native.emulator.faults import Fault, Redirected, Suite

sys.path.append(str(Path(__file__).parents[1]))  # where this file is loaded by its path

from native_cuda.attention_world import BF16, INT8
from native_cuda.test_attention_dual_chunks import check, world

SHAPES = Shape(BF16, None, 64), Shape(BF16, INT8, 64)


def run(launcher: Launcher, source: Path, kv_lens: list[int], owed: list[int], tree: list[int]) -> None:
    kernels = AttentionKernels(Redirected(launcher, source))
    kernels.add(SHAPES)
    kernels.add(SHAPES, DUAL)
    for shape in SHAPES:
        w = world(kernels, shape, (4, 2), kv_lens, DualChunks(44, 60))
        w.k = [k + 3 for k in w.k]  # so that what keys have in common counts
        w.trees = {1: tree}
        check(w, owed)


def run_decode(launcher: Launcher, source: Path) -> None:
    """Two chunks of keys; a tree and a verification across a border of positions."""
    run(launcher, source, [300, 47, 90], [1, 6, 4], [-1, 0, -1, 2, 3])


def run_prefill(launcher: Launcher, source: Path) -> None:
    run(launcher, source, [150, 125], [60, 40], [*range(-1, 15), -1, *range(16, 38)])


SHARED_BY_BOTH = [
    Fault("an origin that nobody makes up for", "m[h] += sign * row_shift(", "m[h] += 0.f * row_shift(", "result"),
    Fault("the query of its own chunk", "head += behind * args.behind * D;", ";", "result"),
    Fault("a border off by one", "before, own} : Span", "before, own + 1} : Span", "result"),
    Fault("a path by places", "path ? __popcll(path) - 1 : query", "query", "result"),
    Fault("all of a path", "if (position >= span.from && position < span.to) seen", "seen", "result"),
    Fault("rows of one chunk", "last.from, first.to};", "first.from, last.to};", "result"),
    Fault("keys by positions alone", "in_tree && last.to > start ? high + 1 : last.to", "last.to", "result"),
]
DECODE = Suite(
    SOURCES / "paged_decode.cu",
    run_decode,
    [
        *SHARED_BY_BOTH,
        Fault("tiles across runs", "keys.any_from & ~15", "keys.any_from", "result"),
        Fault("a ring in use", "__syncwarp();  // all are done with the ring", ";", "thread"),
    ],
)
PREFILL = Suite(SOURCES / "paged_prefill.cu", run_prefill, SHARED_BY_BOTH)
STORE = Suite(
    SOURCES / "kv_store.cu",
    run_decode,
    [
        Fault("no farthest position", "* args.length, args.farthest);", "* args.length, 1 << 20);", "address"),
        Fault(
            "keys by their positions",
            "static_cast<int>(position) % args.length;",
            "static_cast<int>(position);",
            "address",
        ),
        Fault("origins of the first chunk alone", "args.positions[token] < args.length", "true", "result"),
    ],
)


def test_faults_in_decode_are_caught() -> None:
    assert DECODE.survivors(("an origin that nobody makes up for", "a border off by one")) == []


def test_faults_in_prefill_are_caught() -> None:
    assert PREFILL.survivors(("a path by places",)) == []
