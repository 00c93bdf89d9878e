"""What is kept of a draft follows the model's own distribution, whatever was proposed (chi-square, 50,000 draws)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from blade import SamplingParams, Sequence
from blade.engine.sampler import Row, Sampler
from blade.engine.verify import accept
from blade_native.reference import TorchOps

VOCAB, DRAWS, PART = 12, 50_000, 1000
FIRST = torch.tensor([0.3, 2.0, -1.0, 1.2, 0.0, 0.7, -2.5, 1.9, 0.1, -0.3, 1.0, 0.6])
LOGITS = torch.stack([FIRST, 2 * torch.arange(12.0).cos()])
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "cold": {"temperature": 0.5},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.2, "temperature": 1.4},
    "penalties": {"presence_penalty": 1.0, "repetition_penalty": 1.3},
    "bias": {"logit_bias": {2: 3.0}},
}


def expected(row: int, params: SamplingParams, before: list[int]) -> torch.Tensor:
    """The distribution that the settings ask for, worked out plainly: [V]."""
    x = LOGITS[row].double().clone()
    for token in {*before}:
        x[token] = x[token] / params.repetition_penalty if x[token] > 0 else x[token] * params.repetition_penalty
    for token in {*before[1:]}:  # the first one is the prompt
        x[token] -= params.presence_penalty
    for token, bias in params.logit_bias.items():
        x[token] += bias
    p = torch.softmax(x / params.temperature, 0)
    order = p.argsort(descending=True)
    keep = torch.ones(VOCAB, dtype=torch.bool)
    if params.top_k:
        keep[order[params.top_k :]] = False
    if params.top_p < 1:
        keep[order[(p[order].cumsum(0) - p[order]) >= params.top_p]] = False
    keep &= p >= params.min_p * p.max()
    p = p * keep
    return p / p.sum()


def chi_square(counts: torch.Tensor, p: torch.Tensor) -> float:
    """How many standard deviations the statistic is off (Wilson and Hilferty 1931)."""
    assert counts[p == 0].sum() == 0
    p, counts = p[p > 0], counts[p > 0]
    statistic, df = float(((counts - counts.sum() * p) ** 2 / (counts.sum() * p)).sum()), len(p) - 1
    return ((statistic / df) ** (1 / 3) - (1 - 2 / (9 * df))) / math.sqrt(2 / (9 * df))


CASES = [("plain", "likely"), ("plain", "unlikely"), *((name, "mixed") for name in SETTINGS)]


@pytest.mark.parametrize(("settings", "proposal"), CASES)
def test_what_is_kept_is_distributed_as_the_model_says(settings: str, proposal: str) -> None:
    params = SamplingParams(max_tokens=10, **SETTINGS[settings])
    sampler = Sampler(VOCAB, TorchOps("cpu"), secret=7)
    drafted = {"likely": [1], "unlikely": [6], "mixed": list(range(VOCAB))}[proposal]
    first, second = [0] * VOCAB, {token: [0] * VOCAB for token in drafted}
    for start in range(0, DRAWS, PART):
        seqs = [Sequence(start + i, [3], params, draft_ids=[drafted[i % len(drafted)]]) for i in range(PART)]
        rows = [Row(seq, position) for seq in seqs for position in (0, 1)]
        sampled = sampler.sample(LOGITS.repeat(PART, 1), rows)
        for i, seq in enumerate(seqs):
            kept = accept(seq.draft_ids, sampled[2 * i : 2 * i + 2])
            assert isinstance(kept, list)
            first[kept[0].token_id] += 1
            if len(kept) == 2:
                second[seq.draft_ids[0]][kept[1].token_id] += 1
            sampler.forget(seq)
    assert sum(first) == DRAWS
    assert chi_square(torch.tensor(first), expected(0, params, [3])) < 4
    for token, counts in second.items():
        if sum(counts) > 500:
            assert chi_square(torch.tensor(counts), expected(1, params, [3, token])) < 4
