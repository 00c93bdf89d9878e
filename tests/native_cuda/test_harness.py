"""The launch layer over the emulator: what a kernel gets, and what is refused before it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

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
