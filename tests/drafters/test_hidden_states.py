"""Whoever reads hidden states is given those of every token that stays, whatever happens on the way."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
import torch
from generation import PROMPTS, SETTINGS, WAYS, generate, ids

from blade import Config, ConfigError, Draft, EngineConfig, ModelOptions, SamplingParams, Sequence, Step, hookimpl
from blade.assembly import Assembly, choose, load_model
from blade.contracts import NORMED
from blade.engine.batch import build_batch
from blade.plugins import Plugins, load

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor

    from blade.contracts import Model

WIDTH = 64


class Spy:
    """Reads, and drafts what is right every other time."""

    def __init__(self, states: tuple[int, ...]) -> None:
        self.hidden_states = states
        self.seen: dict[int, dict[int, Tensor]] = {}
        self.tokens: dict[int, list[int]] = {}
        self.starts: dict[int, int] = {}
        self.num_again = 0

    def observe(self, seqs: list[Sequence], spans: list[range], rows: list[int], hidden: Tensor) -> None:
        for seq, span, row in zip(seqs, spans, rows, strict=True):
            seen = self.seen.setdefault(seq.id, {})
            self.starts.setdefault(seq.id, span.start)
            for i, position in enumerate(span):
                self.num_again += position in seen
                seen[position] = hidden[row + i].clone()

    def propose(self, seqs: list[Sequence], limits: list[int]) -> list[Draft]:
        for seq in seqs:
            self.tokens[seq.id] = seq.tokens(0, seq.num_tokens)
            assert seq.num_tokens - 1 in {max(self.seen[seq.id]) + 1}  # all but that of the newest token
        return [Draft([7] * limit) if len(seq.output_ids) % 2 else Draft() for seq, limit in zip(seqs, limits)]  # noqa: B905

    def forget(self, seq: Sequence) -> None:
        if seq.id > 0:
            self.tokens[seq.id] = seq.tokens(0, seq.num_tokens)
        else:
            self.seen.pop(seq.id, None)


@pytest.fixture(scope="module")
def assembly(tiny_llama: Path) -> Assembly:
    options = ModelOptions(model=str(tiny_llama), dtype="float32", max_model_len=256)
    return choose(Config(model=options, engine=EngineConfig(threads=1)), load())


@pytest.fixture
def model(assembly: Assembly) -> Iterator[Model]:
    """Its own for each test: what a model shows, it shows for ever."""
    return load_model(assembly)


@pytest.fixture(scope="module")
def expected(tiny_llama: Path) -> Any:
    """ids -> transformers' hidden states after 0, 1 and all layers and after the norm, [L, width] each."""
    from transformers import LlamaForCausalLM

    reference = LlamaForCausalLM.from_pretrained(tiny_llama).eval()
    last: list[Tensor] = []
    reference.model.layers[-1].register_forward_hook(lambda module, args, out: last.append(out))

    @torch.inference_mode()
    def states(tokens: list[int]) -> dict[int, Tensor]:
        found = reference(torch.tensor([tokens]), output_hidden_states=True).hidden_states
        after = last.pop()
        after = after[0] if isinstance(after, tuple) else after
        return {0: found[0][0], 1: found[1][0], 2: after.view(-1, WIDTH), NORMED: found[2][0]}

    return states


def spied(assembly: Assembly, *spies: Spy) -> Assembly:
    """With a drafter for each of them, and the built-in ones."""

    def register_drafters(register: Any) -> None:
        for i, spy in enumerate(spies):
            register(f"spy{i}", lambda config, draft_model, spy=spy: spy)

    module = ModuleType("spies")
    module.register_drafters = hookimpl(register_drafters)  # type: ignore[attr-defined]
    names = ("native", "llama", "fcfs", "local", "ngram", "suffix")
    modules: dict[str, object] = {name: __import__(f"blade_{name}") for name in names}
    return replace(assembly, plugins=Plugins(modules | {"spies": module}))


def check(spy: Spy, expected: Any) -> int:
    """Compare all that was seen; how many states that was."""
    num = 0
    for seq_id, seen in spy.seen.items():
        tokens = spy.tokens[seq_id]
        assert sorted(seen) == list(range(spy.starts[seq_id], len(tokens) - 1))
        wanted = expected(tokens)
        wanted = torch.cat([wanted[state] for state in spy.hidden_states], dim=1)
        found = torch.stack([seen[position] for position in sorted(seen)])
        wanted = wanted[spy.starts[seq_id] : len(tokens) - 1]
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))
        num += len(seen)
    return num


@pytest.mark.parametrize("way", WAYS)
def test_all_states_of_all_tokens_that_stay(assembly: Assembly, model: Model, expected: Any, way: str) -> None:
    spy = Spy((0, 1, 2))
    drafters = {"drafter": ("spy0",), "adaptive_drafts": False}
    said, stats = generate(spied(assembly, spy), model, None, SETTINGS["plain"], rounds=2, **drafters, **WAYS[way])
    plain, _ = generate(assembly, load_model(assembly), None, SETTINGS["plain"], rounds=2, **WAYS[way])
    assert ids(said) == ids(plain)
    assert stats.draft_tokens > stats.draft_tokens_accepted
    assert check(spy, expected) > 1000
    assert any(spy.starts.values()) == (way not in ("little memory", "no prefix cache"))  # of what is cached none come
    if way == "little memory":
        assert stats.preemptions > 0
        assert spy.num_again > 0


def test_the_state_after_the_last_norm_and_several_readers(assembly: Assembly, model: Model, expected: Any) -> None:
    """Beside a drafter that reads none, and with small steps, most of which are replayed."""
    spies = Spy((NORMED, 1)), Spy((2,))
    names = ("ngram", "spy0", "spy1")
    said, stats = generate(
        spied(assembly, *spies), model, None, SETTINGS["greedy"], drafter=names, adaptive_drafts=False
    )
    plain, _ = generate(assembly, load_model(assembly), None, SETTINGS["greedy"])
    assert ids(said) == ids(plain)
    assert check(spies[0], expected) == check(spies[1], expected) > 500
    assert stats.drafters[1].seconds > 0


def test_steps_that_leave_states_are_replayed(assembly: Assembly, model: Model, expected: Any) -> None:
    spec = assembly.kv_spec
    forward: Any = assembly.ops.capture(model, assembly.attention.allocate(spec, 4), assembly.capture)
    shown, seq = torch.zeros(64, 2 * WIDTH), Sequence(1, list(range(20, 60)), SamplingParams(max_tokens=1))
    model.show_hidden((1, NORMED), shown)  # type: ignore[attr-defined]
    seq.blocks, wanted = [2, 0, 3], expected(seq.prompt_ids)
    for seq.computed in range(39):
        batch = build_batch(Step([seq], [1]), spec.block_size, assembly.ops.to_device)
        forward(replace(batch, logits_rows=torch.tensor([0])))
        scale = 1e-4 * float(wanted[1].abs().max())
        torch.testing.assert_close(shown[0, :WIDTH], wanted[1][seq.computed], rtol=0, atol=scale)
        torch.testing.assert_close(shown[0, WIDTH:], wanted[NORMED][seq.computed], rtol=0, atol=1e-3)
    assert len(getattr(forward, "captures", "a")) == 1


def test_nobody_reads_nothing(assembly: Assembly, model: Any) -> None:
    generate(assembly, model, None, SETTINGS["greedy"], prompts=PROMPTS[:1], drafter=("ngram",))
    assert not model.shown


def test_a_state_that_there_is_not(assembly: Assembly, model: Model) -> None:
    with pytest.raises(ConfigError, match="after 3 layers, and the model has 2"):
        generate(spied(assembly, Spy((3,))), model, None, SETTINGS["greedy"], drafter=("spy0",))


def test_a_model_that_shows_none(assembly: Assembly) -> None:
    from blade.testing import FakeModel

    with pytest.raises(ConfigError, match="--drafter spy0 reads hidden states, which FakeForCausalLM does not show"):
        generate(spied(assembly, Spy((1,))), FakeModel(), None, SETTINGS["greedy"], drafter=("spy0",))


def test_a_reader_that_fails_is_turned_off(assembly: Assembly, model: Model, caplog: Any) -> None:
    class Broken(Spy):
        def observe(self, *args: Any) -> None:
            raise ValueError("broken")

    engine = {"drafter": ("spy0",), "adaptive_drafts": False}
    said, stats = generate(spied(assembly, Broken((1,))), model, None, SETTINGS["greedy"], **engine)
    plain, _ = generate(assembly, load_model(assembly), None, SETTINGS["greedy"])
    assert ids(said) == ids(plain)
    assert stats.draft_tokens == 0
    assert "failed to read hidden states" in caplog.text
