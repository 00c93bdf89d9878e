"""Drawing tokens in one call against the same in torch, whose candidates grow until they are enough."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from blade import SamplingParams
from blade.engine import tiles
from blade.engine.drawing import GREEDY, draw, way_of
from blade.engine.truncation import ALL, Settings
from blade_native.simd.ops import SimdOps

PARAMS = [
    SamplingParams(max_tokens=1, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    for temperature, top_k, top_p, min_p in itertools.product(
        (0.0, 0.5, 2.0), (0, 1, 50, 3000), (0.001, 0.9, 1.0), (0.0, 0.05)
    )
]


@pytest.mark.parametrize("vocab_size", [5, 64, 4097, 49_152])
@pytest.mark.parametrize("spread", [0.02, 3.0])
def test_draws_as_torch_does(ops: SimdOps, vocab_size: int, spread: float) -> None:
    logits = torch.randn(len(PARAMS), vocab_size) * spread
    ways = [way_of(each, vocab_size) for each in PARAMS]
    temperatures = torch.tensor(
        [0 if way == GREEDY else each.temperature for way, each in zip(ways, PARAMS, strict=True)]
    )
    settings = Settings(
        temperatures,
        torch.tensor([each.top_k or ALL for each in PARAMS]),
        torch.tensor([each.top_p if each.top_p < 1 else math.inf for each in PARAMS], dtype=torch.float64),
        torch.tensor([each.min_p for each in PARAMS]),
        torch.rand(len(PARAMS), dtype=torch.float64),
    )
    expected, _ = draw(tiles.pad(logits.clone()), ways, settings, None)
    peaks, ids = ops.draw(logits.clone(), temperatures, settings.top_k, settings.top_p, settings.min_p, settings.u)
    assert torch.equal(peaks, logits.amax(-1))
    assert ids.tolist() == [row.token_id for row in expected]


def test_what_vanishes_is_never_drawn(ops: SimdOps) -> None:
    logits = torch.full((2, 300), -1000.0)
    logits[:, [7, 250]] = 1.0
    off = torch.full((2,), ALL), torch.full((2,), math.inf, dtype=torch.float64), torch.zeros(2)
    almost_one = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert ops.draw(logits, torch.ones(2), *off, almost_one)[1].tolist() == [7, 250]
