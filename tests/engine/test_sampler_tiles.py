"""Passes over the vocabulary and the random numbers below the sampler."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from blade.engine import tiles
from blade.engine.uniforms import uniforms


@pytest.mark.parametrize("vocab_size", [1, 64, 100, 4096, 10_000])
@pytest.mark.parametrize("size", [1, 20, 64, 1024])
def test_top_is_topk(vocab_size: int, size: int) -> None:
    logits = torch.randn(5, vocab_size, generator=torch.Generator().manual_seed(size))
    x = tiles.pad(logits)
    values, ids = tiles.top(x, tiles.peaks(x), size)
    num = min(size, vocab_size)
    expected = logits.topk(num)
    assert torch.equal(values[:, :num], expected.values)
    assert torch.equal(ids[:, :num], expected.indices)


def test_padding_is_least_and_only_where_it_must() -> None:
    logits = torch.zeros(2, 64)
    assert tiles.pad(logits) is logits
    padded = tiles.pad(torch.zeros(2, 65))
    assert padded.shape == (2, 128)
    assert padded[:, 65:].eq(-math.inf).all()
    assert tiles.pad(torch.zeros(64, 2).T).is_contiguous()


def test_inverse_transform_follows_the_cumulated_weights() -> None:
    weights = torch.tensor([[0.0, 1.0, 0.0, 3.0, 0.0]])
    below = math.nextafter(0.25, 0)
    for u, index, passed in [(0.0, 1, 0.0), (below, 1, 1.0), (0.25, 3, 0.0), (0.625, 3, 0.5), (1.0, 3, 1.0)]:
        got, rest = tiles.invert_cdf(weights, torch.tensor([u], dtype=torch.float64))
        assert (got.item(), rest.item()) == (index, pytest.approx(passed))


def test_a_draw_goes_through_the_tiles_to_the_id() -> None:
    weights = torch.rand(200, 640, generator=torch.Generator().manual_seed(0))
    u = torch.rand(200, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    cdf = weights.double().cumsum(-1)
    expected = torch.searchsorted(cdf, (u * cdf[:, -1])[:, None], right=True).squeeze(1)
    assert torch.equal(tiles.draw(weights, u), expected)


def test_uniforms_are_a_pure_function_of_seed_and_position() -> None:
    both = uniforms([3, 4, -1, 2**70 + 3], [10, 10, 10, 10])
    assert both[0] == uniforms([3], [10])[0] == both[3] != both[1]
    assert uniforms([3], [11])[0] != both[0]
    # SplitMix64 of seed 0 begins with 0xE220A8397B1DCDAF: here the hash of the seed is the state.
    assert uniforms([0], [0])[0] == (splitmix64(0xE220A8397B1DCDAF) >> 11) * 2.0**-53


def splitmix64(state: int) -> int:
    mask = 2**64 - 1
    z = (state + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


@pytest.mark.parametrize("along", ["seeds", "positions"])
def test_uniforms_are_uniform_and_uncorrelated(along: str) -> None:
    num = 100_000
    steps, zeros = range(num), [0] * num
    u = uniforms(steps, zeros) if along == "seeds" else uniforms(zeros, steps)
    assert u.min() >= 0
    assert u.max() < 1
    counts = np.histogram(u, bins=50, range=(0, 1))[0]
    assert ((counts - num / 50) ** 2 / (num / 50)).sum() < 85.4, "49 degrees of freedom, once in a thousand times"
    assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 0.011
