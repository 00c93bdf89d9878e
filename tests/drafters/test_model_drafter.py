"""The drafter over a second model: its drafts are that model's own text, wherever the target's goes."""

from __future__ import annotations

import pytest

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


@pytest.fixture
def drafter() -> ModelDrafter:
    model = FakeModel()
    runner = Runner(model, model.allocate(64, 4), TorchOps(), CaptureOptions(), 0)
    return ModelDrafter(EngineConfig(), DraftModel(runner, BlockPool(64, 4), model.config.max_context))


@pytest.mark.parametrize("num_right", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("then", [[], [7]], ids=["as drafted", "otherwise"])
def test_drafts_go_on_where_the_target_is(drafter: ModelDrafter, num_right: int, then: list[int]) -> None:
    seq = Sequence(1, PROMPT, SamplingParams(max_tokens=64, temperature=0), output_ids=[55])
    for _ in range(3):
        (draft,) = drafter.propose([seq], [4])
        assert draft.ids == FakeModel().generate(PROMPT + seq.output_ids, 4)
        seq.output_ids += draft.ids[:num_right] + then
