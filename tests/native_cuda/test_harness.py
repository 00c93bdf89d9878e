"""The launch layer over the emulator: what a kernel gets, and what is refused before it runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from blade_native.cuda.arguments import packer
from blade_native.cuda.source import SourceError, inline, kernels
from blade_native.emulator.nvrtc import check

if TYPE_CHECKING:
    from blade_native.cuda.launch import Kernel, Launcher

SCALE = """
#include "portable.cuh"
template <class T> struct ScaleArgs {
  T* out;
  const T* x;  // [n]
  float factor;
  int n, offset;
  long long pad;
};
template <class T, int WIDTH>
__global__ void __launch_bounds__(WIDTH) scale(const ScaleArgs<T> args) {
  const int i = blockIdx.x * WIDTH + threadIdx.x + args.offset;
  if (i < args.n) args.out[i] = from_float<T>(to_float(args.x[i]) * args.factor);
}
"""


@pytest.fixture(scope="session")
def scale(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Kernel:
    path = tmp_path_factory.mktemp("cuda") / "scale.cu"
    path.write_text(SCALE)
    return launcher.load(path, ["scale<__half, 32>"]).kernel("scale<__half, 32>")


def test_a_kernel_runs_on_tensors(scale: Kernel) -> None:
    x = torch.arange(100, dtype=torch.float16)
    out = torch.zeros_like(x)
    scale((4,), (32,), out=out, x=x, factor=0.5, n=90, offset=1, pad=2**40)
    assert torch.equal(out[1:90], x[1:90] / 2)
    assert out[0] == 0
    assert not out[90:].any()


@pytest.mark.parametrize(
    "wrong",
    [{"x": torch.zeros(1)}, {"n": 2**31}, {"n": 1.5}, {"factor": "1"}, {"x": None, "y": None}],
)
def test_wrong_arguments_are_refused(scale: Kernel, wrong: dict[str, object]) -> None:
    x = torch.zeros(1, dtype=torch.float16)
    values = {"out": x, "x": x, "factor": 1.0, "n": 1, "offset": 0, "pad": 0} | wrong
    with pytest.raises(TypeError):
        scale((1,), (32,), **values)


@pytest.mark.emulator
def test_the_example_of_the_manual(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manual = (Path(__file__).parents[2] / "docs/cuda-emulator.md").read_text(encoding="utf-8")
    kernel, launch = (re.search(rf"```{kind}\n(.*?)```", manual, re.DOTALL)[1] for kind in ("cuda", "python"))
    (tmp_path / "scale.cu").write_text(kernel)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(launch, names)
    assert torch.equal(names["out"], names["x"] / 2)
    assert [row.violations() for row in check(tmp_path / "scale.cu", ["sm_90"])] == [[]] * 3


NEGATIVE = {
    "an unknown base": "struct A : B { int x; };\n__global__ void f(const A a) {}",
    "padding before a member": "struct B { long long x; int y; };\nstruct A : B { int z; };\n__global__ void f(A a) {}",
    "no struct": "__global__ void f(int* x) {}",
    "an array member": "struct A { int x[4]; };\n__global__ void f(const A a) {}",
    "a nested struct": "struct B { int x; };\nstruct A { B b; };\n__global__ void f(A a) {}",
}


@pytest.mark.parametrize("text", NEGATIVE.values(), ids=NEGATIVE)
def test_kernels_that_cannot_be_launched_are_refused(text: str) -> None:
    with pytest.raises(SourceError):
        kernels(text)


def test_signatures_are_read_from_the_source() -> None:
    text = """
    template <class T> struct A {  // int not_me;
      const T *x, *y; unsigned char* __restrict__ z;
      unsigned n, m; bool flag; long long stride; /* float no; */ float scale;
    };
    template <class T, int N = 4> __global__ void __launch_bounds__(N * (2 + 2)) f(const __grid_constant__ A<T> a) {}
    """
    found = kernels(text)["f"]
    assert found.parameters == ("T", "N")
    assert [(field.name, field.element) for field in found.fields] == [
        ("x", "T"), ("y", "T"), ("z", "unsigned char"), ("n", None), ("m", None), ("flag", None), ("stride", None),
        ("scale", None),
    ]  # fmt: skip
    layout = found.layout()
    assert (layout.fields["flag"][1], layout.fields["stride"][1], layout.itemsize) == (32, 40, 56)
    values = (1, 2, 3, 4, 5, True, -6, 0.5)
    assert np.frombuffer(packer(layout).pack(*values), layout)[0].tolist() == values


def test_headers_are_inlined_once_with_their_lines(tmp_path: Path) -> None:
    (tmp_path / "a.cuh").write_text("#pragma once\nint a;\n")
    (tmp_path / "b.cuh").write_text('#pragma once\n#include "a.cuh"\nint b;\n')
    (tmp_path / "k.cu").write_text('#include "a.cuh"\n#include "b.cuh"\n#include <cuda_fp16.h>\nint k;\n')
    text = inline(tmp_path / "k.cu")
    assert text.count("int a;") == text.count("int b;") == 1
    assert "<cuda_fp16.h>" in text
    assert text.endswith('#line 2 "k.cu"\n\n#include <cuda_fp16.h>\nint k;\n')  # the blank is line 2's end


def test_a_capture_freezes_arguments(launcher: Launcher, scale: Kernel) -> None:
    x, out = torch.ones(32, dtype=torch.float16), torch.zeros(32, dtype=torch.float16)
    launcher.cupy.capture = captured = []
    try:
        scale((1,), (32,), out=out, x=x, factor=2.0, n=32, offset=0, pad=0)
    finally:
        launcher.cupy.capture = None
    assert not out.any()
    x.fill_(3)
    captured[0].run()
    assert (out == 6).all()
