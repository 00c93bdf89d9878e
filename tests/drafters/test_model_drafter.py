"""The drafter over a second model: its drafts are that model's own text, wherever the target's goes."""

from __future__ import annotations

from typing import Any

import pytest
from fetches import count_fetches

from blade import EngineConfig, SamplingParams, Sequence, Step
from blade.contracts import DraftModel
from blade.engine.blocks import BlockPool
from blade.engine.runner import ModelRunner
from blade.testing import FakeModel
from blade.types import CaptureOptions, Sampled
from blade_draft.drafter import ModelDrafter
from blade_native.reference import TorchOps

PROMPT = [5, 8, 13, 21, 34]


class Runner(ModelRunner):
    """It knows how many tokens each of its sequences had in each step."""

    def run(self, step: Step) -> list[list[Sampled] | Exception]:
        assert min(step.num_tokens) > 0
        return super().run(step)


def make_drafter(num_blocks: int = 64, max_context: int = 4096, max_batch_tokens: int = 2048) -> ModelDrafter:
    model = FakeModel()
    options = CaptureOptions(block_size=4)
    runner = Runner(model, model.allocate(num_blocks, 4), TorchOps(), options, 0)
    config = EngineConfig(max_batch_tokens=max_batch_tokens, max_num_seqs=8)
    return ModelDrafter(config, DraftModel(runner, BlockPool(num_blocks, 4), max_context))


@pytest.fixture
def drafter() -> ModelDrafter:
    return make_drafter()


def make_seq(seq_id: int, num_prompt: int, **params: Any) -> Sequence:
    prompt = [(seq_id * 31 + i) % 97 for i in range(num_prompt)]
    params = {"max_tokens": 64, "temperature": 0} | params
    return Sequence(seq_id, prompt, SamplingParams(**params), output_ids=[55])


def says(seq: Sequence, num: int) -> list[int]:
    return FakeModel().generate(seq.prompt_ids + seq.output_ids, num)


@pytest.mark.parametrize("num_right", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("then", [[], [7]], ids=["as drafted", "otherwise"])
def test_drafts_go_on_where_the_target_is(drafter: ModelDrafter, num_right: int, then: list[int]) -> None:
    seq = Sequence(1, PROMPT, SamplingParams(max_tokens=64, temperature=0), output_ids=[55])
    for _ in range(3):
        (draft,) = drafter.propose([seq], [4])
        assert draft.ids == FakeModel().generate(PROMPT + seq.output_ids, 4)
        seq.output_ids += draft.ids[:num_right] + then


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 1.0, "top_p": 0.5},
        {"logit_bias": {9: 2.0}, "min_tokens": 9},
        {"repetition_penalty": 1.3, "frequency_penalty": 1.0},
    ],
)
def test_the_host_waits_once_for_a_draft(monkeypatch: pytest.MonkeyPatch, params: dict[str, Any]) -> None:
    """However many tokens it has."""
    nums = []
    for limit in (1, 5):
        drafter, seqs = make_drafter(), [make_seq(i, 3 + 4 * i, **params) for i in range(3)]
        nums.append(count_fetches(monkeypatch, lambda: drafter.propose(seqs, [limit] * 3)))  # noqa: B023
    assert nums == [1, 1]


def test_each_sequence_has_a_limit_of_its_own(drafter: ModelDrafter) -> None:
    seqs = [make_seq(i, 5 + i) for i in range(4)]
    limits = [2, 0, 5, 1]
    drafts = drafter.propose(seqs, limits)
    assert [draft.ids for draft in drafts] == [says(seq, limit) for seq, limit in zip(seqs, limits, strict=True)]


def test_steps_are_of_bounded_size() -> None:
    drafter, seqs = make_drafter(max_batch_tokens=8), [make_seq(i, 3 + 6 * i) for i in range(4)]
    for _ in range(2):
        drafts = drafter.propose(seqs, [4, 2, 4, 3])
        assert [draft.ids for draft in drafts] == [says(seq, n) for seq, n in zip(seqs, [4, 2, 4, 3], strict=True)]
        for seq in seqs:
            seq.output_ids += [1, 2]


def test_drafts_are_as_long_as_there_is_room() -> None:
    """For their KV, which the last id has none of, and in the draft model's context."""
    drafter, seq = make_drafter(num_blocks=2), make_seq(1, 5)
    assert drafter.propose([seq], [6])[0].ids == says(seq, 3)
    other = make_seq(2, 6)
    assert drafter.propose([other], [6])[0].ids == says(other, 2)  # the first one has given its blocks
    drafter, seq = make_drafter(max_context=9), make_seq(1, 5)
    assert drafter.propose([seq], [6])[0].ids == says(seq, 3)
