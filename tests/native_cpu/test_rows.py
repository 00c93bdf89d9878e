"""Row ops and selection against their torch formulas."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from blade_native.reference import TorchOps
from blade_native.simd.ops import SimdOps

DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 1e-6}, torch.bfloat16: {"rtol": 2**-7, "atol": 1e-6}}
SHAPES = [(1, 16), (3, 100), (40, 896), (2, 7)]
EPS = 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (5, 4, 80), (0, 64)], ids=str)
def test_rms_norm(ops: SimdOps, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = 3 * torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)
    want = F.rms_norm(x.float(), (shape[-1],), weight.float(), EPS).to(dtype)
    torch.testing.assert_close(ops.rms_norm(x, weight, EPS), want, **TOLERANCE[dtype])


def test_rms_norm_of_heads_within_a_fused_projection(ops: SimdOps) -> None:
    fused, weight = torch.randn(6, 10 * 32), torch.randn(32)
    heads = fused[:, 64:192].view(6, 4, 32)
    torch.testing.assert_close(ops.rms_norm(heads, weight, EPS), F.rms_norm(heads, (32,), weight, EPS))
    with pytest.raises(ValueError, match="side by side"):
        ops.rms_norm(torch.randn(4, 32, 6).transpose(1, 2), weight, EPS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_add_rms_norm(ops: SimdOps, shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, residual = torch.randn(2, *shape).to(dtype)
    weight = torch.randn(shape[-1]).to(dtype)
    total = x + residual
    y, kept = ops.add_rms_norm(x, residual, weight, EPS)
    torch.testing.assert_close(kept, total, rtol=0, atol=0)
    torch.testing.assert_close(
        y, F.rms_norm(total.float(), (shape[-1],), weight.float(), EPS).to(dtype), **TOLERANCE[dtype]
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [1, 16, 100, 5000])
def test_add_rows(ops: SimdOps, d: int, dtype: torch.dtype) -> None:
    y, x = torch.randn(9, d).to(dtype), torch.randn(4, d).to(dtype)
    rows = torch.tensor([8, 0, 3, 5])
    want = y.clone()
    want[rows] += x
    ops.add_rows(y, rows, x)
    assert torch.equal(y, want)
    ops.add_rows(y, None, want)
    assert torch.equal(y, want + want)
    with pytest.raises(ValueError, match="x"):
        ops.add_rows(y, None, x)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
@pytest.mark.parametrize("num_tokens", [0, 1, 40])
def test_scale_rows(ops: SimdOps, num_tokens: int, dtype: torch.dtype) -> None:
    q = torch.randn(num_tokens, 9, 24).to(dtype)[:, 2:7]
    factors, rows = torch.rand(100) + 1, torch.randint(100, (num_tokens,))
    want = (q.float() * factors[rows][:, None, None]).to(dtype)
    assert torch.equal(ops.scale_rows(q, factors, rows), want)
    assert torch.equal(TorchOps().scale_rows(q, factors, rows), want)
    with pytest.raises(ValueError, match="rows"):
        ops.scale_rows(q.float(), factors, torch.zeros(num_tokens + 1, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int64], ids=str)
def test_copy_rows(ops: SimdOps, dtype: torch.dtype) -> None:
    wide, out = torch.randn(40, 900).to(dtype), torch.zeros(50, 300, dtype=dtype)
    ops.copy_rows(wide[:, 200:300], out[:40, 100:200])
    assert torch.equal(out[:40, 100:200], wide[:, 200:300])
    assert not out[:, :100].any()
    assert not out[:, 200:].any()
    assert not out[40:].any()
    ops.copy_rows(wide[:0, :300], out[:0])
    with pytest.raises(ValueError, match="side by side"):
        ops.copy_rows(wide[:4, :4].T, out[:4, :4])
    with pytest.raises(ValueError, match="shape"):
        ops.copy_rows(wide[:4, :4], out[:4, :5])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_silu_mul(ops: SimdOps, shape: tuple[int, int], dtype: torch.dtype) -> None:
    gate_up = (20 * torch.randn(shape[0], 2 * shape[1])).to(dtype)
    gate, up = gate_up.float().chunk(2, dim=-1)
    torch.testing.assert_close(ops.silu_mul(gate_up), (F.silu(gate) * up).to(dtype), **TOLERANCE[dtype])


def test_silu_mul_of_extreme_gates(ops: SimdOps) -> None:
    gates = torch.tensor([[-1e4, -90.0, -0.0, 90.0, 1e4, torch.nan]])
    y = ops.silu_mul(torch.cat((gates, torch.ones_like(gates)), dim=1))
    torch.testing.assert_close(y, F.silu(gates), rtol=1e-6, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("shape", [(1, 1), (3, 15), (2, 1000), (17, 333), (2, 9001)], ids=str)
def test_argmax(ops: SimdOps, shape: tuple[int, int]) -> None:
    logits = torch.randn(shape).mul(3).round()  # many equal values
    values, ids = ops.argmax(logits)
    assert torch.equal(values, logits.amax(-1))
    assert torch.equal(ids, logits.argmax(-1))


@pytest.mark.parametrize("k", [0, 1, 5, 200])
def test_equal_ones_of_the_most_likely_come_by_id(ops: SimdOps, k: int) -> None:
    logits = torch.randn(3, 9001).mul(3).round()
    log_sums, logprobs, ids = ops.logprobs(logits, k)
    torch.testing.assert_close(log_sums, logits.logsumexp(-1))
    order = logits.sort(dim=-1, descending=True, stable=True)
    assert torch.equal(ids, order.indices[:, :k])
    assert torch.equal(logprobs, order.values[:, :k] - log_sums[:, None])


def test_selection_survives_nan_and_infinity(ops: SimdOps) -> None:
    logits = torch.full((3, 100), torch.nan)
    logits[1, ::2] = torch.arange(50.0)
    logits[2] = -torch.inf
    assert ops.argmax(logits[:2])[0].isnan().all()
    log_sums, logprobs, ids = ops.logprobs(logits, 60)
    assert log_sums[:2].isnan().all()
    assert log_sums[2] == -torch.inf
    assert logprobs.isnan().all()
    assert ((ids >= 0) & (ids < 100)).all()


def test_of_no_rows_nothing_is_chosen(ops: SimdOps) -> None:
    logits, none = torch.empty(0, 100), torch.empty(0)
    values, ids = ops.argmax(logits)
    assert (values.shape, ids.shape) == ((0,), (0,))
    assert [x.shape for x in ops.logprobs(logits, 3)] == [(0,), (0, 3), (0, 3)]
    settings = none, none.long(), none.double(), none, none.double()
    assert [x.shape for x in ops.draw(logits, *settings)] == [(0,), (0,)]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_argmax_shows_what_spoils_a_long_row(ops: SimdOps, bad: float) -> None:
    logits = torch.zeros(2, 20_000)
    logits[:, [9_000, 13_000]] = 7.0
    logits[1, 19_999] = bad
    values, ids = ops.argmax(logits)
    assert (values[0], ids[0]) == (7.0, 9_000)
    assert values[1].isnan()


def test_wrong_input_is_refused(ops: SimdOps) -> None:
    x = torch.zeros(2, 32)
    with pytest.raises(TypeError, match="weight is "):
        ops.rms_norm(x, torch.ones(32, dtype=torch.bfloat16), EPS)
    with pytest.raises(ValueError, match="weight has shape"):
        ops.rms_norm(x, torch.ones(31), EPS)
    with pytest.raises(ValueError, match="residual has shape"):
        ops.add_rms_norm(x, torch.zeros(3, 32), torch.ones(32), EPS)
    with pytest.raises(ValueError, match="odd width"):
        ops.silu_mul(torch.zeros(2, 33))
    with pytest.raises(ValueError, match="k = 33"):
        ops.logprobs(x, 33)


def test_float16_goes_to_the_torch_ops(ops: SimdOps) -> None:
    x, weight = torch.randn(3, 32).half(), torch.ones(32).half()
    torch.testing.assert_close(ops.rms_norm(x, weight, EPS), TorchOps().rms_norm(x, weight, EPS))
    torch.testing.assert_close(ops.linear(x, None)(x), x @ x.T)
