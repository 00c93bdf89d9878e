"""Norms and the gate over the emulator: the contract's kit, and rows of every width and stride against torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from blade.testing import check_ops
from blade_native.cuda.ops import CudaOps
from blade_native.cuda.rows import TEAMS, RowKernels
from blade_native.reference import TorchOps

if TYPE_CHECKING:
    from torch import Tensor

    from blade_native.cuda.launch import Launcher

pytestmark = pytest.mark.timeout(600)  # whoever comes first waits for the compiler
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-6


@pytest.fixture(scope="module")
def ops(launcher: Launcher) -> CudaOps:
    return CudaOps(TorchOps(), launcher)


def rows(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def launched(ops: CudaOps) -> list[str]:
    """Names of the kernels launched so far."""
    return [launch.kernel.name for launch in ops.launcher.cupy.launches]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_contract(ops: CudaOps, dtype: torch.dtype) -> None:
    check_ops(ops, [dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "team"), [(64, 8), (128, 8), (512, 32), (2064, 0), (7168, 0)])
def test_widths(ops: CudaOps, dtype: torch.dtype, width: int, team: int) -> None:
    """Per head, per row, and more than a warp or one vector a thread holds."""
    x, weight, residual = (
        rows(*shape, dtype=dtype, seed=len(shape)) for shape in ((5, width), (width,), (5, 1, width))
    )
    before = len(launched(ops))
    normed = ops.rms_norm(x, weight, EPS)
    torch.testing.assert_close(normed, TorchOps().rms_norm(x, weight, EPS))
    if dtype != torch.float32:
        assert launched(ops)[before:] == [
            f"rms_norm<{'__half' if dtype == torch.float16 else '__nv_bfloat16'}, {team}>"
        ]
    residual = residual.squeeze(1)
    expected = TorchOps().add_rms_norm(x, residual.clone(), weight, EPS)
    normed, total = ops.add_rms_norm(x, residual, weight, EPS)
    assert total is residual
    assert torch.equal(total, expected[1])
    torch.testing.assert_close(normed, expected[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_of_a_fused_projection(ops: CudaOps, dtype: torch.dtype) -> None:
    """[T, H, D] with other heads between two tokens."""
    heads, weight = rows(7, 11, 64, dtype=dtype), rows(64, dtype=dtype)
    before = len(launched(ops))
    for part in torch.split(heads, (6, 5), dim=1):
        torch.testing.assert_close(ops.rms_norm(part, weight, EPS), TorchOps().rms_norm(part, weight, EPS))
    assert len(launched(ops)) == before + 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_gate(ops: CudaOps, dtype: torch.dtype) -> None:
    gate_up = 8 * rows(3, 2 * 4112, dtype=dtype)  # several blocks a row
    gate, up = gate_up.float().chunk(2, dim=-1)
    torch.testing.assert_close(ops.silu_mul(gate_up), (torch.nn.functional.silu(gate) * up).to(dtype))


def test_a_row_does_not_depend_on_the_rows_beside_it(ops: CudaOps) -> None:
    x, weight = rows(40, 128, dtype=torch.bfloat16), rows(128, dtype=torch.bfloat16)
    assert torch.equal(ops.rms_norm(x, weight, EPS)[17:18], ops.rms_norm(x[17:18].clone(), weight, EPS))


def test_what_is_not_covered_is_torchs(ops: CudaOps) -> None:
    before = len(launched(ops))
    wide, odd = rows(2, 40000, dtype=torch.float32), rows(2, 30, dtype=torch.bfloat16)
    transposed, shifted = rows(64, 8, dtype=torch.float32).T, rows(2 * 64 + 1, dtype=torch.float32)[1:].view(2, 64)
    for x in (wide, odd, transposed, shifted, odd.double(), wide[:0]):
        weight = torch.ones(x.shape[-1], dtype=x.dtype)
        assert torch.equal(ops.rms_norm(x, weight, EPS), TorchOps().rms_norm(x, weight, EPS))
    assert torch.equal(ops.silu_mul(odd), TorchOps().silu_mul(odd))
    assert len(launched(ops)) == before


def test_every_team_has_a_kernel(launcher: Launcher) -> None:
    kernels = RowKernels(launcher)
    assert {team for _, team in kernels._norms} == set(TEAMS)
