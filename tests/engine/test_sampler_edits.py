"""What requests change in their logits: against transformers where it has the same, else against the definition."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Sequence as Seq
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

from blade import SamplingParams, Sequence
from blade.engine.edits import LogitEdits, Row
from blade.engine.penalties import TokenCounts
from blade.engine.sampler import Sampler, SamplingError
from blade_native.reference import TorchOps

VOCAB = 80
WIDTH = 128
counter = itertools.count()


def make_seq(num_prompt: int, num_output: int, draft: int = 0, **params: Any) -> Sequence:
    number = next(counter)
    rng = random.Random(number)
    seq = Sequence(number, rng.choices(range(VOCAB), k=num_prompt), SamplingParams(max_tokens=100, **params))
    seq.output_ids = rng.choices(range(VOCAB // 2), k=num_output)
    seq.draft_ids = rng.choices(range(VOCAB), k=draft)
    return seq


def rows_of(seq: Sequence) -> list[Row]:
    first = len(seq.prompt_ids) + len(seq.output_ids) - 1
    return [Row(seq, position) for position in range(first, seq.num_tokens)]


def expected(logits: Tensor, row: Row) -> Tensor:
    params, tokens = row.seq.params, row.seq.tokens(0, row.position + 1)
    output = tokens[len(row.seq.prompt_ids) :]
    penalty = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)
    out = penalty(torch.tensor([tokens]), logits[None])[0].clone()
    for token_id, count in Counter(output).items():
        out[token_id] -= params.presence_penalty + count * params.frequency_penalty
    for token_id, bias in params.logit_bias.items():
        out[token_id] += bias
    if len(output) < params.min_tokens:
        out[[token_id for token_id in params.stop_token_ids if token_id < VOCAB]] = -math.inf
    return out


CASES: list[dict[str, Any]] = [
    {"repetition_penalty": 1.5},
    {"repetition_penalty": 0.7},
    {"presence_penalty": 1.0},
    {"frequency_penalty": -0.5},
    {"repetition_penalty": 1.2, "presence_penalty": -2.0, "frequency_penalty": 0.25},
    {"logit_bias": {0: 5.0, 79: -100.0}},
    {"min_tokens": 7, "stop_token_ids": (3, 4, 10**6)},
    {"repetition_penalty": 1.1, "logit_bias": {1: 1.0}, "min_tokens": 2, "stop_token_ids": (1,)},
    {"temperature": 0.5},
]


def test_edits_equal_the_reference_in_a_mixed_batch() -> None:
    seqs = [
        make_seq(12, num_output, draft, **case) for case in CASES for num_output, draft in ((0, 0), (6, 3), (40, 0))
    ]
    edits = LogitEdits(VOCAB)
    for _ in range(3):  # as the output grows
        rows = [row for seq in seqs for row in rows_of(seq)]
        logits = torch.randn(len(rows), WIDTH, generator=torch.Generator().manual_seed(1))
        x = logits.clone()
        assert edits.apply(x, rows) == {}
        for i, row in enumerate(rows):
            torch.testing.assert_close(x[i], expected(logits[i], row))
        for seq in seqs:
            seq.output_ids += [*seq.draft_ids[:2], 5, 77]
            seq.draft_ids = []


@pytest.mark.parametrize("num_output", [0, 40])
def test_ids_that_only_the_device_knows_count_as_others_do(num_output: int) -> None:
    seqs = [make_seq(12, num_output, 5, **case) for case in CASES]
    known = [Row(seq, seq.num_tokens - 1) for seq in seqs]
    drawn = torch.tensor([seq.draft_ids for seq in seqs] + [[0] * 5]).T  # of a row more: one that has ended
    logits = torch.randn(len(seqs), WIDTH, generator=torch.Generator().manual_seed(2))
    expected_logits, x = logits.clone(), logits.clone()
    LogitEdits(VOCAB).apply(expected_logits, known)
    LogitEdits(VOCAB).apply(x, [Row(row.seq, row.position, []) for row in known], [*drawn])
    assert torch.equal(x, expected_logits)


def test_counts_follow_the_output_and_not_the_drafts() -> None:
    counts = TokenCounts([5, 5, 9])
    output: list[int] = []
    for token_id in itertools.chain(range(100), range(50)):
        output.append(token_id)
        counts.update(output)
        counts.update(output)
        for drafts in ([5, 200, 200], []):
            ids, numbers = counts.after(drafts)
            known = dict(zip(ids.tolist(), numbers.tolist(), strict=True))
            assert known == {5: 0, 9: 0} | Counter(output + drafts)


def test_the_choices_of_one_prompt_have_it_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []

    class Counting(TokenCounts):
        def __init__(self, prompt_ids: Seq[int]) -> None:
            counted.append(len(prompt_ids))
            super().__init__(prompt_ids)

    monkeypatch.setattr("blade.engine.edits.TokenCounts", Counting)
    edits, params = LogitEdits(VOCAB), {"repetition_penalty": 1.2, "frequency_penalty": 0.5}
    seqs = [make_seq(12, num_output, **params) for num_output in (0, 3, 9, 40)]
    for seq in seqs:
        seq.prompt_ids = seqs[0].prompt_ids
    other = make_seq(13, 5, **params)
    for _ in range(3):  # as the output grows, of each choice by itself
        rows = [row for seq in [*seqs, other] for row in rows_of(seq)]
        logits = torch.randn(len(rows), WIDTH, generator=torch.Generator().manual_seed(3))
        x = logits.clone()
        edits.apply(x, rows)
        for i, row in enumerate(rows):
            torch.testing.assert_close(x[i], expected(logits[i], row))
        for seq in seqs:
            seq.output_ids += [seq.id % VOCAB] * 2
    assert counted == [0, 12, 13]  # none yet, and each prompt


def test_a_forgotten_sequence_leaves_nothing() -> None:
    sampler = Sampler(VOCAB, TorchOps())
    seq = make_seq(4, 2, repetition_penalty=1.5)
    sampler.sample(torch.randn(1, VOCAB), rows_of(seq))
    assert sampler._edits._kept
    sampler.forget(seq)
    sampler.forget(seq)
    assert not sampler._edits._kept


def test_processors_see_the_output_and_come_after_the_penalties() -> None:
    seen: list[tuple[list[int], float]] = []

    def processor(output_ids: list[int], logits: Tensor) -> None:
        assert logits.shape == (VOCAB,)
        seen.append((list(output_ids), logits[7].item()))
        logits[11] = 99.0
        logits[12] = 98.0

    seq = make_seq(
        3, 2, 1, temperature=0.0, processors=(processor,), logit_bias={7: 3.0}, min_tokens=4, stop_token_ids=(11,)
    )
    logits = torch.zeros(2, VOCAB)
    results = Sampler(VOCAB, TorchOps()).sample(logits, rows_of(seq))
    assert seen == [(seq.output_ids, 3.0), (seq.output_ids + seq.draft_ids, 3.0)]
    assert [result.token_id for result in results] == [12, 12], "min_tokens has the last word"


def raises(output_ids: list[int], logits: Tensor) -> None:
    logits[:] = math.nan
    raise RuntimeError("of no concern to others")


def forbids_all(output_ids: list[int], logits: Tensor) -> None:
    logits.fill_(-math.inf)


@pytest.mark.parametrize("processor", [raises, forbids_all])
def test_a_failing_processor_fails_its_own_row(processor: Any, caplog: pytest.LogCaptureFixture) -> None:
    seqs = [make_seq(3, 2), make_seq(3, 2, processors=(processor,), logprobs=1), make_seq(3, 2, top_p=0.5)]
    rows = [rows_of(seq)[0] for seq in seqs]
    logits = torch.randn(3, VOCAB)
    alone = [Sampler(VOCAB, TorchOps(), secret=1).sample(logits[[i]], [rows[i]])[0] for i in (0, 2)]
    results = Sampler(VOCAB, TorchOps(), secret=1).sample(logits.clone(), rows)
    assert isinstance(results[1], SamplingError)
    assert [results[0], results[2]] == alone
    assert f"sequence {seqs[1].id} " in caplog.text
