"""Draws against a naive reference: transformers' warpers on one row, softmax in float64, inverse transform by id."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from blade import SamplingParams
from blade.engine import drawing, tiles, truncation
from blade.engine.truncation import ALL, Settings, draw_from_all, draw_from_top, more_than

NUM_ROWS = 16
NO_IDS = torch.zeros(1, 0, dtype=torch.int64)
PEAKED, USUAL, FLAT = 8.0, 3.0, 0.5  # standard deviation of the logits

SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0.8},
    {"top_k": 2},
    {"top_k": 50},
    {"top_k": 64},
    {"top_k": 1500},
    {"top_p": 0.1},
    {"top_p": 0.9},
    {"top_p": 0.999},
    {"min_p": 0.05},
    {"min_p": 1e-4},
    {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
    {"temperature": 1.5, "top_k": 2000, "top_p": 0.8, "min_p": 0.001},
    {"temperature": 0.01, "top_p": 0.5, "min_p": 0.5},
]


KEEP_MORE_THAN_1024: list[dict[str, Any]] = [{"top_p": 0.999}, {"min_p": 1e-4}]


def reference(logits: Tensor, u: Tensor, temperature: float = 1.0, **truncations: float) -> list[int]:
    makers: dict[str, Callable[[Any], Any]] = {
        "top_k": TopKLogitsWarper,
        "top_p": TopPLogitsWarper,
        "min_p": MinPLogitsWarper,
    }
    warpers = [make(truncations[name]) for name, make in makers.items() if name in truncations]
    scores = LogitsProcessorList([TemperatureLogitsWarper(temperature), *warpers])(NO_IDS, logits)
    cdf = scores.double().softmax(-1).cumsum(-1)
    return torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True).squeeze(1).tolist()


def settings_of(u: Tensor, params: SamplingParams) -> Settings:
    ones = torch.ones(len(u))
    top_p = params.top_p if params.top_p < 1 else float("inf")
    return Settings(
        params.temperature * ones, (params.top_k or ALL) * ones.long(), top_p * ones.double(), params.min_p * ones, u
    )


@pytest.mark.parametrize("vocab_size", [100, 10_000])
@pytest.mark.parametrize("spread", [PEAKED, USUAL, FLAT])
@pytest.mark.parametrize("given", SETTINGS, ids=str)
def test_draws_equal_the_reference(given: dict[str, Any], spread: float, vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    logits = torch.randn(NUM_ROWS, vocab_size, generator=generator) * spread
    u = torch.rand(NUM_ROWS, generator=generator, dtype=torch.float64)
    params = SamplingParams(max_tokens=1, **given)
    way = drawing.way_of(params, vocab_size)
    drawn, _ = drawing.draw(tiles.pad(logits.clone()), [way] * NUM_ROWS, settings_of(u, params), None)
    assert [row.token_id for row in drawn] == reference(logits, u, **given)


@pytest.mark.parametrize("given", SETTINGS[1:], ids=str)
def test_how_many_tokens_are_looked_at_does_not_matter(given: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(NUM_ROWS, 10_048, generator=generator).mul(3).bfloat16().float()  # full of equals
    params = SamplingParams(max_tokens=1, **given)
    settings = settings_of(torch.rand(NUM_ROWS, generator=generator, dtype=torch.float64), params)
    whole = "top_k" not in given and "top_p" in given
    expected = draw_from_all(x, settings, whole)
    for size in truncation.SIZES[:-1]:
        if size > params.top_k:
            ids, enough = draw_from_top(x, tiles.peaks(x), settings, size, whole)
            assert torch.equal(ids[enough], expected[enough])
            assert enough.any() or size == 64 or given in KEEP_MORE_THAN_1024


def test_equals_at_the_edge_are_all_kept() -> None:
    logits = torch.zeros(1, 10_048)
    logits[0, 300:400] = 1.0
    u = torch.linspace(0, 0.9999, 500, dtype=torch.float64)
    for given in ({"top_k": 3}, {"top_p": 0.001}, {"min_p": 0.9}):
        params = SamplingParams(max_tokens=1, **given)
        ways = [drawing.way_of(params, 10_048)] * len(u)
        drawn, _ = drawing.draw(logits.expand(len(u), -1).contiguous(), ways, settings_of(u, params), None)
        assert {row.token_id for row in drawn} == set(range(300, 400))


def test_forbidden_tokens_are_never_drawn() -> None:
    logits = torch.full((1, 10_048), float("-inf"))
    allowed = [17, 5000, 10_047]
    logits[0, allowed] = 1.0
    u = torch.tensor([0.0, 0.2, 0.5, 0.999_999_999, 1 - 2**-53], dtype=torch.float64)
    for given in ({}, {"top_k": 50}, {"top_p": 0.99}, {"min_p": 1e-6}, {"top_k": 5000, "top_p": 0.99}):
        params = SamplingParams(max_tokens=1, **given)
        ways = [drawing.way_of(params, 10_048)] * len(u)
        drawn, _ = drawing.draw(logits.expand(len(u), -1).contiguous(), ways, settings_of(u, params), None)
        assert [row.token_id for row in drawn] == [17, 17, 5000, 10_047, 10_047]


def test_sizes_grow_until_all() -> None:
    assert [more_than(0), more_than(63), more_than(64), more_than(5000)] == [64, 64, 1024, ALL]


def test_one_row_needs_more_candidates_while_another_has_all() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 10_048, generator=generator) * 0.01
    params = [SamplingParams(max_tokens=1, top_k=5000), SamplingParams(max_tokens=1, top_p=0.99)]
    u = torch.tensor([0.5, 0.5], dtype=torch.float64)
    settings = Settings(
        torch.ones(2),
        torch.tensor([5000, ALL]),
        torch.tensor([float("inf"), 0.99], dtype=torch.float64),
        torch.zeros(2),
        u,
    )
    drawn, _ = drawing.draw(x.clone(), [drawing.way_of(each, 10_048) for each in params], settings, None)
    expected = [reference(x[:1], u[:1], top_k=5000), reference(x[1:], u[1:], top_p=0.99)]
    assert [[row.token_id] for row in drawn] == expected
