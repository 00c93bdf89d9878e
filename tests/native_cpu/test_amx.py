"""Linears with tile registers, which plain C++ stands in for: a linear's source alone, compiled for any machine.

`just amx-check` runs the tests of all kernels so.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch
from torch import Tensor

from blade_native.reference import TorchOps
from blade_native.simd import build, emulated
from blade_native.simd.library import Kernel, Library, load
from blade_native.simd.ops import SimdOps

from .conftest import THREADS, require_sound_tiles, unavailable
from .test_linear_grouped import require_close, weight_of

ROWS = [1, 2, 15, 16, 17, 31, 32, 33, 64, 70, 141]  # registers whole and not, one tile and several, a block and two
FAULTS = {
    "none": None,
    "never shaped": "#UD: a tile instruction without shapes",
    "released": "#UD: a tile instruction without shapes",
    "unshaped register": "#UD: a register without a shape",
    "other rows": "#UD: sums and activations have other numbers of rows",
    "other words": "#UD: activations and weights have other numbers of words",
    "other channels": "#UD: sums and weights have other numbers of channels",
    "one register twice": "#UD: a register is two operands",
    "part of a word": "#UD: part of a word",
    "too many rows": "#GP: ldtilecfg of shapes that there are not",
    "too many bytes": "#GP: ldtilecfg of shapes that there are not",
    "rows without bytes": "#GP: ldtilecfg of shapes that there are not",
    "unknown palette": "#GP: ldtilecfg of shapes that there are not",
}


def compile_emulated(folder: Path, *sources: Path) -> ctypes.CDLL:
    if (cxx := build.compiler()) is None:
        pytest.skip("there is no C++ compiler")
    target = folder / "emulated.so"
    flags = [*build.FLAGS, "-O0", *emulated.AMX, f"-I{build.SOURCES}", '-DBLADE_SOURCE_HASH=""']
    build.run([cxx, *flags, "-shared", *map(str, sources), "-o", str(target)])
    return ctypes.CDLL(str(target))


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> Library:
    """The portable kernels but for the linear, which multiplies in tiles."""
    if reason := unavailable():
        pytest.skip(reason)
    sources = (build.SOURCES / name for name in ("linear.cpp", "parallel.cpp"))
    dll = compile_emulated(tmp_path_factory.mktemp("amx"), *sources)
    library = load({"BLADE_CPU_ISA": "portable"})
    library.linear, library._dll = Kernel(dll, "linear", library.recording), dll
    return library


@pytest.fixture
def ops(tiles: Library) -> SimdOps:
    return SimdOps(TorchOps(), tiles, THREADS)


def tile_sums(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x W^T + b in the order of TDPBF16PS: of 16 words of two the even products are summed, the odd ones, then both."""
    sums = bias.expand(len(x), -1).clone()
    products = x.float()[:, None] * weight.float()  # exact
    for start in range(0, x.shape[1], 32):
        part = torch.zeros(2, *sums.shape)
        for pair in products[..., start : start + 32].split(2, dim=-1):
            part += pair.movedim(-1, 0)
        sums += part[0] + part[1]
    return sums


@pytest.mark.parametrize("k", [2, 32, 46, 322])  # one word, a register of them, with a rest, and slices
def test_bfloat16_is_summed_in_the_order_of_the_instruction_however_many_rows(ops: SimdOps, k: int) -> None:
    weight, bias, x = torch.randn(70, k).bfloat16(), torch.randn(70), torch.randn(max(ROWS), k).bfloat16()
    linear, want = ops.linear(weight, bias), tile_sums(x, weight, bias)
    for m in ROWS:
        assert linear(x[:m], torch.float32).equal(want[:m])
    require_sound_tiles(ops.library)


def test_subnormals_are_zeros(ops: SimdOps) -> None:
    tiny = torch.tensor([[2.0**-130, 2.0**-70, 0, 0]]).bfloat16()
    weight = torch.tensor([[1.0, 0, 0, 0], [0, 2.0**-60, 0, 0], [0, 2.0**-56, 0, 0]]).bfloat16()
    assert ops.linear(weight, None)(tiny, torch.float32).tolist() == [[0, 0, 2.0**-126]]


@pytest.mark.parametrize("name", ["q4_1", "q6_k", "awq64", "q8_0", "eight16", "eight_bf16", "channel8", "nf4"])
def test_integers_are_those_of_single_rows(ops: SimdOps, name: str) -> None:
    weight, bias = weight_of(name, 70), torch.randn(70)
    linear, x = ops.quantized_linear(weight, bias), torch.randn(max(ROWS), weight.q.shape[1])
    one_by_one = torch.cat([linear(row) for row in x.split(1)])
    require_close(ops, one_by_one, x, weight, bias)
    for m in ROWS:
        assert linear(x[:m]).equal(one_by_one[:m])
    require_sound_tiles(ops.library)


@pytest.fixture(scope="module")
def registers(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    dll = compile_emulated(tmp_path_factory.mktemp("registers"), Path(__file__).with_name("amx_faults.cpp"))
    dll.fault_of.restype = ctypes.c_char_p
    return dll


@pytest.mark.parametrize("case", FAULTS)
def test_what_the_processor_would_refuse_is_refused(registers: ctypes.CDLL, case: str) -> None:
    fault = registers.fault_of(case.encode())
    assert (None if fault is None else fault.decode()) == FAULTS[case]
