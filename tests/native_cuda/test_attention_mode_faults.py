"""The tests of attention over pages of codes notice what breaks its kernels: see test_attention_faults.py."""

from __future__ import annotations

import sys
from pathlib import Path

from blade_native.cuda.attention_kernels import AttentionKernels, Shape
from blade_native.cuda.launch import SOURCES, Launcher
from blade_native.emulator.faults import Fault, Redirected, Suite

sys.path.append(str(Path(__file__).parents[1]))  # where this file is loaded by its path

from native_cuda.attention_world import BF16, F16, World, attention, check

SHAPES = (
    Shape(BF16, "int4_affine", 96),
    Shape(BF16, "int8_affine", 64),
    Shape(F16, "int4", 80),
    Shape(F16, "fp8_e5m2", 80),
)


def run_read(launcher: Launcher, source: Path) -> None:
    """Three sequences of which one has two chunks; all ends lie within tiles of sixteen keys. Values have a mean, so
    that their middles count."""
    kernels = AttentionKernels(Redirected(launcher, source))
    kernels.add(SHAPES)
    for shape in SHAPES:
        world = World(attention(kernels, 1), shape, (8, 2), [300, 41, 3])
        world.v = [v + 1 for v in world.v]
        check(world, [1, 4, 1])


def run_written(launcher: Launcher, source: Path) -> None:
    kernels = AttentionKernels(Redirected(launcher, source))
    kernels.add(SHAPES)
    for shape in SHAPES:
        check(World(attention(kernels), shape, (2, 1), [20, 40]), [3, 40])


PAGES = Suite(
    SOURCES / "paged_decode.cu",
    run_read,
    [
        Fault(
            "nibbles of another order", "word >> 4 * i & 0x000f000fu", "word >> (12 - 4 * i) & 0x000f000fu", "result"
        ),
        Fault("nibbles without a sign", "0x43084308", "0x43004300", "result"),
        Fault(
            "codes without middles", "return fma2<T>(codes, scale, middle);", "return times<T>(codes, scale);", "result"
        ),
        Fault("one group", "return group_of<C>(chunk) != group_of<C>(chunk - 1);", "return false;", "result"),
        Fault("numbers past the end", "min(max(num_valid * BYTES - at, 0), PART)", "PART", "result"),
        Fault("middles not rescaled", "offset[h] *= shrink[h];", ";", "result"),
        Fault("middles of other rows", "q_sum[i >> 1] * (", "q_sum[i & 1] * (", "result"),
        Fault("queries past the end", "if (first < D) fragment[i]", "fragment[i]", "result"),
        Fault(
            "numbers of keys alone", "stage + Stage::VALUE_NUMBERS + row", "stage + Stage::KEY_NUMBERS + row", "result"
        ),
    ],
)
CODES = Suite(
    SOURCES / "kv_store.cu",
    run_written,
    [
        Fault("values as they are", "  if (Storage<S>::Values::BITS == 4 && is_v) x.transform(lane);\n", "", "result"),
        Fault("ranges of whole warps", "GROUP == 32 ? 8 : 16", "16", "result"),
        Fault(
            "codes that do not fit", "fminf(fmaxf(code, -MOST), MOST - 1)", "fminf(fmaxf(code, -MOST), MOST)", "result"
        ),
        Fault("floats that do not fit", "exponent - (C::TOP << 23)", "exponent - ((C::TOP + 1) << 23)", "result"),
        Fault("middles without a place", "numbers[(GROUPS + group) * stride]", "numbers[group * stride]", "result"),
    ],
)
OUTPUTS = Suite(
    SOURCES / "hadamard.cu",
    run_written,
    [
        Fault("sums as they are", "  x.transform(lane);\n", "", "result"),
        Fault("heads past the end", "  if (head >= args.num_heads) return;\n", "", "address"),
    ],
)


def test_faults_in_pages_are_caught() -> None:
    assert PAGES.survivors(("one group",)) == []


def test_faults_in_codes_are_caught() -> None:
    assert CODES.survivors(("ranges of whole warps",)) == []
