"""A chain of steps that know their ids only on the device says what steps say that are told them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from blade import Batch, CaptureOptions, KVCache, SamplingParams, Sequence, Step
from blade.engine.blocks import BlockPool
from blade.engine.runner import ModelRunner
from blade.testing import FakeModel
from blade_native.reference import TorchOps

BLOCK_SIZE = 4
PROMPTS = [[5, 8, 13, 21, 34, 55, 89], [3, 1, 4], [2, 7, 1, 8, 2, 8], [9]]
LIMITS = [6, 6, 3, 1]
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "plain": {},
    "top k": {"temperature": 1.5, "top_k": 20},
    "top p": {"temperature": 0.2, "top_p": 0.3},
    "min p": {"temperature": 0.1, "min_p": 0.5},
    "penalties": {"frequency_penalty": 1.0, "presence_penalty": 1.0, "repetition_penalty": 1.3},
    "bias": {"temperature": 0, "logit_bias": {20: 3.0, 21: 3.5}},
    "min tokens": {"temperature": 0, "min_tokens": 4, "stop_token_ids": tuple(range(0, 260, 2))},
    "processors": {"temperature": 0, "processors": (lambda ids, logits: logits.index_fill_(0, last(ids), 9.0),)},
}


def last(ids: list[int]) -> torch.Tensor:
    """Of the next token, by the two before it."""
    return torch.tensor([sum(ids[-2:], 1) % 260])


def make_runner(model: Any = None) -> ModelRunner:
    model = model or FakeModel()
    options = CaptureOptions(enabled=False, block_size=BLOCK_SIZE)
    return ModelRunner(model, model.allocate(64, BLOCK_SIZE), TorchOps(), options, secret=7)


def make_step(settings: list[dict[str, Any]], blocks: BlockPool) -> Step:
    step = Step()
    for i, (prompt, limit) in enumerate(zip(PROMPTS, LIMITS, strict=True)):
        params = SamplingParams(**{"max_tokens": 64, "seed": i} | settings[i % len(settings)])
        seq = Sequence(i, prompt, params, output_ids=[40 + i])
        assert blocks.grow(seq, seq.num_owed + limit - 1)
        step.add(seq, seq.num_owed)
    return step


def one_by_one(step: Step, limits: list[int]) -> list[list[int]]:
    runner = make_runner()
    drafts = []
    for seq, limit in zip(step.seqs, limits, strict=True):
        start = len(seq.output_ids)
        for _ in range(limit):
            ((token,),) = runner.run(Step([seq], [seq.num_owed]))  # type: ignore[misc]
            seq.computed = seq.num_tokens
            seq.output_ids.append(token.token_id)
        drafts.append(seq.output_ids[start:])
    return drafts


@pytest.mark.parametrize("settings", [*SETTINGS, "mixed"])
def test_drafts_are_what_steps_say_one_by_one(settings: str) -> None:
    chosen = list(SETTINGS.values())[:4] if settings == "mixed" else [SETTINGS[settings]]
    blocks = BlockPool(64, BLOCK_SIZE)
    step = make_step(chosen, blocks)
    before = [(seq.computed, list(seq.output_ids), list(seq.blocks)) for seq in step.seqs]
    drafts = make_runner().draft(step, LIMITS)
    assert [(seq.computed, seq.output_ids, seq.blocks) for seq in step.seqs] == before
    assert [len(ids) for ids in drafts] == LIMITS
    assert drafts == one_by_one(step, LIMITS)


@pytest.mark.parametrize("settings", SETTINGS)
def test_where_there_is_nothing_to_sample_the_guess_is_some_id(settings: str) -> None:
    class Broken(FakeModel):
        def forward(self, batch: Batch, kv: KVCache) -> torch.Tensor:
            assert int(batch.input_ids.max()) < self.config.vocab_size
            return torch.full_like(super().forward(batch, kv), torch.nan)

    step = make_step([SETTINGS[settings]], BlockPool(64, BLOCK_SIZE))
    drafts = make_runner(Broken()).draft(step, LIMITS)
    assert all(0 <= token_id < 260 for ids in drafts for token_id in ids)
