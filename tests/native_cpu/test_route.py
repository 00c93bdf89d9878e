"""A router's choice and gates against their torch twins."""

from __future__ import annotations

import math

import pytest
import torch

from blade_native.reference import TorchOps
from blade_native.simd.ops import SimdOps

DTYPES = [torch.float32, torch.bfloat16]
ROWS = [1, 2, 7, 33, 200]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize(("num_experts", "k"), [(1, 1), (8, 2), (60, 4), (61, 16), (128, 8), (512, 10), (17, 17)])
def test_route(ops: SimdOps, num_experts: int, k: int, sigmoid: bool, normalize: bool, dtype: torch.dtype) -> None:
    for rows in ROWS:
        logits = torch.randn(rows, num_experts).mul(4).round().to(dtype)  # many equal values
        ids, weights = ops.route(logits, k, normalize, sigmoid)
        want_ids, want_weights = TorchOps().route(logits, k, normalize, sigmoid)
        assert torch.equal(ids, want_ids)
        torch.testing.assert_close(weights, want_weights, rtol=1e-5, atol=1e-7)
        alone = ops.route(logits[-1:], k, normalize, sigmoid)[1]
        assert torch.equal(weights[-1:], alone)  # whatever rows stand beside it


@pytest.mark.parametrize("normalize", [False, True])
def test_route_never_names_an_expert_that_is_not_there(ops: SimdOps, normalize: bool) -> None:
    logits = torch.full((6, 20), -torch.inf)
    logits[0] = torch.nan
    logits[1, ::2] = torch.nan
    logits[2, 3] = torch.inf
    logits[3] = -torch.inf
    logits[4, 7] = 1.0  # fewer likely experts than are asked for
    logits[5] = torch.linspace(-1, 1, 20) * 3e38
    ids, weights = ops.route(logits, 16, normalize)
    assert all(len(set(row)) == 16 and set(row) <= set(range(20)) for row in ids.tolist())
    assert weights[:4].isnan().all()
    assert weights[4:].tolist() == [[1.0, *[0.0] * 15], [1.0, *[pytest.approx(0, abs=1e-37)] * 15]]
    assert ids[4].tolist() == [7, *range(7), *range(8, 16)]
    same, weights = ops.route(logits, 16, normalize, sigmoid=True)
    assert torch.equal(same, ids)
    assert weights[:4].isnan().all()
    first = 1 if normalize else pytest.approx(1 / (1 + math.exp(-1)))
    assert weights[4].tolist() == [first, *[0.0] * 15]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [16, 100, 896, 7])
def test_sigmoid_mul(ops: SimdOps, width: int, dtype: torch.dtype) -> None:
    for rows in ROWS:
        x, gates = torch.randn(rows, width).to(dtype), (20 * torch.randn(rows, 2 * width + 1)).to(dtype)
        for gate in (gates[:, width : 2 * width], gates[:, 5:6], gates[:, :width].contiguous()):
            want = (x.float() * gate.float().sigmoid()).to(dtype)
            torch.testing.assert_close(ops.sigmoid_mul(x.clone(), gate), want, rtol=2**-7, atol=1e-6)
            if dtype is torch.float32:
                torch.testing.assert_close(ops.sigmoid_mul(x.clone(), gate), want, rtol=1e-5, atol=1e-6)


def test_wrong_input_is_refused(ops: SimdOps) -> None:
    x = torch.zeros(3, 8)
    for k in (0, 9):
        with pytest.raises(ValueError, match=f"k = {k}"):
            ops.route(x, k, True)
    with pytest.raises(ValueError, match="not contiguous"):
        ops.route(torch.zeros(8, 3).T, 2, True)
    for gate in (torch.zeros(3, 7), torch.zeros(2, 8), torch.zeros(3, 8).bfloat16(), torch.zeros(8, 3).T):
        with pytest.raises(ValueError, match="gate is"):
            ops.sigmoid_mul(x, gate)


def test_float16_goes_to_the_torch_ops(ops: SimdOps) -> None:
    x = torch.randn(3, 8).half()
    assert torch.equal(ops.sigmoid_mul(x, x), TorchOps().sigmoid_mul(x, x))
    assert torch.equal(ops.route(x, 2, True)[0], TorchOps().route(x, 2, True)[0])
