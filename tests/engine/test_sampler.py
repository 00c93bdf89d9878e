"""The sampler as a whole: what a row gets depends on its own logits, seed, position and tokens, and on nothing else."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from blade import Sampled, SamplingParams, Sequence
from blade.engine.sampler import Row, Sampler, SamplingError
from blade_native.reference import TorchOps

VOCAB = 151
counter = itertools.count()
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.7},
    "top_k": {"top_k": 9},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.1},
    "all": {"temperature": 1.3, "top_k": 40, "top_p": 0.9, "min_p": 0.01},
    "penalties": {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.3},
    "bias": {"logit_bias": {3: 4.0, 5: -100.0}, "top_p": 0.95},
    "min_tokens": {"min_tokens": 4, "stop_token_ids": (1, 2)},
    "logprobs": {"logprobs": 3},
}


def make_sampler(vocab_size: int = VOCAB) -> Sampler:
    return Sampler(vocab_size, TorchOps(), secret=1)


def make_seq(prompt: list[int] | None = None, output: list[int] | None = None, **params: Any) -> Sequence:
    seq = Sequence(next(counter), prompt or [1, 2, 3], SamplingParams(max_tokens=100, **{"seed": 0, **params}))
    seq.output_ids = output or []
    return seq


def last_row(seq: Sequence) -> Row:
    return Row(seq, seq.num_tokens - 1)


def random_logits(num_rows: int, vocab_size: int = VOCAB, seed: int = 0) -> Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 3


def ids(results: list[Sampled | SamplingError]) -> list[int]:
    assert all(isinstance(result, Sampled) for result in results), results
    return [result.token_id for result in results if isinstance(result, Sampled)]


@pytest.mark.parametrize("vocab_size", [1, 63, 64, 65, 1000])
def test_greedy_takes_the_lowest_id_among_equals(vocab_size: int) -> None:
    logits = torch.zeros(3, vocab_size)
    logits[1, vocab_size // 2 :] = 1
    logits[2, -1] = 1
    rows = [last_row(make_seq(temperature=0.0)) for _ in range(3)]
    assert ids(make_sampler(vocab_size).sample(logits, rows)) == [0, vocab_size // 2, vocab_size - 1]


def test_what_leaves_one_token_is_greedy() -> None:
    logits = torch.zeros(3, VOCAB)
    logits[:, 70:90] = 1
    rows = [last_row(make_seq(**params)) for params in ({"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-40})]
    first, second, coldest = ids(make_sampler().sample(logits, rows))
    assert first == second == 70
    assert coldest in range(70, 90)


@pytest.mark.parametrize("params", SETTINGS.values(), ids=SETTINGS.keys())
def test_a_row_depends_on_nothing_else_in_the_batch(params: dict[str, Any]) -> None:
    logits = random_logits(len(SETTINGS) + 1)
    seq = make_seq(output=[4, 4, 9], **params)
    others = [last_row(make_seq(output=[7], **other)) for other in SETTINGS.values()]
    alone = make_sampler().sample(logits[:1].clone(), [last_row(seq)])
    assert make_sampler().sample(logits.clone(), [last_row(seq), *others])[0] == alone[0]
    moved = torch.cat([logits[1:], logits[:1]])
    assert make_sampler().sample(moved, [*others, last_row(seq)])[-1] == alone[0]


@pytest.mark.parametrize("params", SETTINGS.values(), ids=SETTINGS.keys())
def test_drafts_change_nothing(params: dict[str, Any]) -> None:
    logits = random_logits(6)
    plain, sampler = make_seq(**params), make_sampler()
    expected: list[Sampled | SamplingError] = []
    for i in range(6):
        expected += sampler.sample(logits[i : i + 1].clone(), [last_row(plain)])
        plain.output_ids.append(ids(expected)[-1])
    drafted = make_seq(output=plain.output_ids[:1], **params)
    drafted.draft_ids = plain.output_ids[1:5]
    rows = [Row(drafted, position) for position in range(3, 8)]
    sampler = make_sampler()
    assert sampler.sample(logits[1:].clone(), rows) == expected[1:]
    assert sampler.sample(logits[1:].clone(), rows) == expected[1:], "a step that is run again"
    drafted.output_ids, drafted.draft_ids = plain.output_ids[:3], []  # two drafts were accepted, two were not
    assert sampler.sample(logits[3:4].clone(), [last_row(drafted)]) == expected[3:4]


def test_the_seed_decides() -> None:
    logits = torch.zeros(1, VOCAB).expand(64, -1)

    def draw(sampler: Sampler, seed: int | None) -> list[int]:
        seq = make_seq([0] * 100, seed=seed)
        seq.id = 5
        return ids(sampler.sample(logits.clone(), [Row(seq, position) for position in range(99, 163)]))

    first = Sampler(VOCAB, TorchOps())
    second = Sampler(VOCAB, TorchOps())
    assert draw(first, 3) == draw(second, 3) != draw(first, 4)
    assert draw(first, None) == draw(first, None) != draw(second, None), "one secret per process"


CHI_SQUARE_LIMIT = {19: 43.8, 9: 27.9, 7: 24.3}  # by degrees of freedom, exceeded once in a thousand times


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ({}, range(20)),
        ({"temperature": 0.5}, range(20)),
        ({"top_k": 8}, range(12, 20)),
        ({"top_p": 0.6}, range(12, 20)),
        ({"min_p": 0.55}, range(10, 20)),
    ],
)
def test_the_distribution_is_right(params: dict[str, Any], kept: range) -> None:
    num_rows = 20_000
    logits = torch.arange(1.0, 21.0).log()  # token i has weight i + 1
    seq = make_seq([0], **params)
    seq.output_ids = [0] * num_rows
    seq.draft_ids = []
    rows = [Row(seq, position) for position in range(num_rows)]
    drawn = make_sampler(20).sample(logits.expand(num_rows, -1).clone(), rows)
    counts = torch.bincount(torch.tensor(ids(drawn)), minlength=20).double()
    weights = torch.zeros(20, dtype=torch.float64)
    weights[kept.start :] = logits[kept.start :].double().div(params.get("temperature", 1.0)).exp()
    expected = weights / weights.sum() * num_rows
    assert counts[: kept.start].sum() == 0
    chi_square = ((counts - expected) ** 2 / expected.clamp(min=1e-9)).sum().item()
    assert chi_square < CHI_SQUARE_LIMIT[len(kept) - 1]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("params", SETTINGS.values(), ids=SETTINGS.keys())
def test_a_bad_row_fails_alone(params: dict[str, Any], bad: float) -> None:
    logits = random_logits(4)
    rows = [last_row(make_seq(**params)) for _ in range(4)]
    expected = make_sampler().sample(logits.clone(), rows)
    logits[1] = bad
    logits[2, 100] = math.nan
    results = make_sampler().sample(logits, rows)
    assert isinstance(results[1], SamplingError)
    assert isinstance(results[2], SamplingError)
    assert (results[0], results[3]) == (expected[0], expected[3])


def test_a_nan_that_cannot_be_drawn_spoils_the_logprobs_all_the_same() -> None:
    logits = random_logits(1)
    logits[0, 7] = math.nan
    seq = make_seq(temperature=0.0, logprobs=1, min_tokens=1, stop_token_ids=(7,))
    assert isinstance(make_sampler().sample(logits, [last_row(seq)])[0], SamplingError)


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {"repetition_penalty": 3.0, "logit_bias": {1: 50.0}}])
def test_logprobs_are_of_the_raw_distribution(params: dict[str, Any]) -> None:
    logits = random_logits(3)
    expected = logits.log_softmax(-1)
    rows = [last_row(make_seq(logprobs=num_top, **params)) for num_top in (0, 2, 20)]
    results = make_sampler().sample(logits, rows)
    for i, (result, num_top) in enumerate(zip(results, (0, 2, 20), strict=True)):
        assert isinstance(result, Sampled)
        assert result.logprob == pytest.approx(expected[i, result.token_id].item(), abs=1e-5)
        values, token_ids = expected[i].topk(num_top)
        assert [top.token_id for top in result.top] == token_ids.tolist()
        assert [top.logprob for top in result.top] == pytest.approx(values.tolist(), abs=1e-5)


def test_logprobs_where_fewer_tokens_are_possible_than_asked_for() -> None:
    logits = torch.full((1, 5), -math.inf)
    logits[0, 2] = 1.0
    result = make_sampler(5).sample(logits, [last_row(make_seq(logprobs=20))])[0]
    assert isinstance(result, Sampled)
    assert (result.token_id, result.logprob) == (2, 0.0)
    assert [top.token_id for top in result.top] == [2]
