"""Who reads hidden states is given those that the sequence's own adapter makes."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
import torch

from blade import Draft, hookimpl
from blade.checkpoint.peft import read_adapter
from blade.contracts import NORMED
from blade.plugins import Plugins

from .test_generation import PROMPTS, folders, generate, prepare

if TYPE_CHECKING:
    from pathlib import Path

    from blade import Sequence

__all__ = ["folders"]  # the fixture


class Reader:
    """Proposes what the model's own output matrix makes of the last state: the token that has come already."""

    hidden_states = (NORMED,)

    def __init__(self) -> None:
        self.lm_head: Any = None
        self.num_right = self.num_wrong = 0
        self.said: dict[int, dict[int, int]] = {}  # by id of the sequence: position -> the token that follows

    def observe(self, seqs: list[Sequence], spans: list[range], rows: list[int], hidden: torch.Tensor) -> None:
        ids = self.lm_head(hidden.clone(), torch.float32).argmax(-1).tolist()
        for seq, span, row in zip(seqs, spans, rows, strict=True):
            self.said.setdefault(seq.id, {}).update({position: ids[row + i] for i, position in enumerate(span)})

    def propose(self, seqs: list[Sequence], limits: list[int]) -> list[Draft]:
        return [Draft([5] * min(limit, 2)) for limit in limits]

    def forget(self, seq: Sequence) -> None:
        said, start = self.said.pop(seq.id, {}), len(seq.prompt_ids) - 1
        for i, token_id in enumerate(seq.output_ids[:-1]):
            self.num_right += said[start + i] == token_id
            self.num_wrong += said[start + i] != token_id


@pytest.mark.parametrize("engine", [{}, {"max_batch_tokens": 12, "max_num_seqs": 6}], ids=["together", "small steps"])
def test_states_of_a_mixed_batch(folders: dict[str, Path], engine: dict[str, Any]) -> None:
    assembly, model, adapters = prepare(folders["none"], lora=("a=b",))
    reader = Reader()
    reader.lm_head = model.lm_head
    module = ModuleType("reader")
    module.register_drafters = hookimpl(lambda register: register("reader", lambda config, draft_model: reader))  # type: ignore[attr-defined]
    builtin: dict[str, object] = {name: __import__(f"blade_{name}") for name in ("native", "llama", "fcfs", "local")}
    assembly = replace(assembly, plugins=Plugins(builtin | {"reader": module}))
    loaded = [adapters.make(name, read_adapter(folders[name])) for name in ("attention", "all of one")]
    drafts = {"drafter": ("reader",), "adaptive_drafts": False}
    found = generate((assembly, model, adapters), [None, *loaded], **drafts, **engine)
    assert reader.num_wrong == 0
    assert reader.num_right == sum(len(said) - 1 for said in found) == len(PROMPTS) * 23
