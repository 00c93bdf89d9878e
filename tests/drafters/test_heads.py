"""Heads against their formulas, and what is drafted with them against the same formulas applied again and again."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from fetches import count_fetches
from head_references import (
    DRAFT_VOCAB,
    EPS,
    VOCAB,
    WIDTH,
    EagleReference,
    MTPReference,
    eagle_config,
    eagle_tensors,
    mtp_tensors,
)

from blade import CaptureOptions, EngineConfig, HeadDrafter, KVSpec, SamplingParams, Sequence, Step
from blade.contracts import DraftHead
from blade.engine.batch import build_batch
from blade.engine.blocks import BlockPool
from blade.engine.head_drafter import KEPT, MOST_UNREAD
from blade.engine.head_runner import HeadRunner
from blade.nn import Loader
from blade_eagle.architecture import Eagle3, SpeculatorsEagle3
from blade_mtp.head import MultiTokenPrediction
from blade_native import cpu_ops, paged_attention
from blade_qwen.hybrid import Qwen35, Qwen35Moe

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from blade.contracts import Head, Ops

BLOCK_SIZE, NUM_BLOCKS = 16, 50
SPECULATORS = {
    "architectures": ["Eagle3Speculator"],
    "speculators_model_type": "eagle3",
    "draft_vocab_size": DRAFT_VOCAB,
    "eagle_aux_hidden_state_layer_ids": [0, 1, 2],
    "transformer_layer_config": {
        key: value for key, value in eagle_config().items() if key not in ("draft_vocab_size", "architectures")
    },
}
QWEN35 = {
    "architectures": ["Qwen3_5ForCausalLM"], "hidden_size": WIDTH, "vocab_size": VOCAB, "intermediate_size": 96,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "num_hidden_layers": 4, "rms_norm_eps": EPS,
    "max_position_embeddings": 256, "hidden_act": "silu", "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 777.0, "partial_rotary_factor": 0.25},
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 24,
    "linear_conv_kernel_dim": 4,
}  # fmt: skip


@cache
def ops() -> Ops:
    """One op set for all: what is captured is what its own kernels are asked for."""
    return cpu_ops(1)


class DictWeights:
    """contracts.Weights over tensors in memory."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def names(self) -> Iterable[str]:
        return self.tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def get(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        return self.tensors[name].to(dtype or self.tensors[name].dtype)

    def release(self, names: Iterable[str]) -> None:
        """They stay."""


@dataclass
class Case:
    """A head as blade reads it, and its formula."""

    architecture: Any
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    reference: Any
    num_states: int
    target_config: Any

    def build(self) -> Head:
        reference = self.reference
        output = getattr(reference, "output_matrix", reference.embedding)
        target: Any = SimpleNamespace(
            embed=ops().embedding(reference.embedding.clone()),
            lm_head=ops().linear(output.clone(), None),
            hidden_size=WIDTH,
        )
        weights = self.architecture.weights(self.config, DictWeights(self.tensors))
        loader = Loader(weights, ops(), paged_attention(ops()), torch.float32)
        config = replace(self.architecture.configure(self.config, self.target_config), max_context=200)
        head: Head = self.architecture.build(config, loader, target)
        return head


def eagle(config: dict[str, Any], extra: dict[str, tuple[int, ...]] | None = None, **reference: Any) -> Case:
    tensors, embedding = eagle_tensors(**extra or {}), torch.randn(VOCAB, WIDTH)
    target = SimpleNamespace(architecture="LlamaForCausalLM", vocab_size=VOCAB, num_layers=2, max_context=200)
    target.hidden_size = WIDTH
    embedding = tensors.get("embed_tokens.weight", embedding)
    architecture = SpeculatorsEagle3() if "transformer_layer_config" in config else Eagle3()
    return Case(architecture, config, tensors, EagleReference(tensors, embedding, **reference), 3, target)


def speculators() -> Case:
    case = eagle(SPECULATORS | {"norm_output": True}, norm_before_residual=True, norm_output=True)
    renamed = {name.replace("midlayer.", "layers.0."): x for name, x in case.tensors.items()}
    return replace(case, tensors=renamed)


def mtp() -> Case:
    target = Qwen35().configure(QWEN35)
    tensors = mtp_tensors(WIDTH, 4, 2, 32, 96)
    reference = MTPReference(tensors, torch.randn(VOCAB, WIDTH), torch.randn(VOCAB, WIDTH), 4, 32, 0.25, 777.0)
    others = {"model.norm.weight": torch.ones(WIDTH)}
    return Case(MultiTokenPrediction(), QWEN35, tensors | others, reference, 1, target)


def mtp_with_experts() -> Case:
    """The experts in fused tensors, as Qwen3.5 has them."""
    case, inner, num = mtp(), 48, 6
    sizes = {"num_experts": num, "num_experts_per_tok": 3, "moe_intermediate_size": inner}
    config = QWEN35 | sizes | {"shared_expert_intermediate_size": 32, "architectures": ["Qwen3_5MoeForCausalLM"]}
    shapes = {
        "gate.weight": (num, WIDTH),
        "experts.gate_up_proj": (num, 2 * inner, WIDTH),
        "experts.down_proj": (num, WIDTH, inner),
        "shared_expert_gate.weight": (1, WIDTH),
        "shared_expert.gate_proj.weight": (32, WIDTH),
        "shared_expert.up_proj.weight": (32, WIDTH),
        "shared_expert.down_proj.weight": (WIDTH, 32),
    }
    tensors = {name: x for name, x in case.tensors.items() if ".mlp." not in name}
    tensors |= {f"mtp.layers.0.mlp.{name}": torch.randn(shape) * 0.2 for name, shape in shapes.items()}
    reference = replace(case.reference, tensors=tensors, num_active=3)
    return replace(
        case, config=config, tensors=tensors, reference=reference, target_config=Qwen35Moe().configure(config)
    )


CASES = {
    "eagle3": lambda: eagle(eagle_config()),
    "eagle3 whose embedding is its own": lambda: eagle(
        eagle_config(), {"embed_tokens__weight": (VOCAB, WIDTH), "model__rotary_emb__inv_freq": (8,)}
    ),
    "eagle3 with its states normalised": lambda: eagle(
        eagle_config(norm_before_fc=True), {"input_norm__weight": (3 * WIDTH,)}
    ),
    "eagle3 with each state normalised": lambda: eagle(
        eagle_config(fc_norm=True), {f"fc_norm__{i}__weight": (WIDTH,) for i in range(3)}
    ),
    "eagle3 of speculators": speculators,
    "mtp": mtp,
    "mtp with experts": mtp_with_experts,
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    torch.manual_seed(0)
    return CASES[request.param]()


def allocate(head: Head) -> Any:
    config = head.config
    spec = KVSpec(1, config.num_heads, config.num_kv_heads, config.head_dim, "float32", BLOCK_SIZE)
    return paged_attention(ops()).allocate(spec, NUM_BLOCKS)


def close(found: Tensor, expected: Tensor) -> None:
    known = expected.isfinite()
    assert torch.equal(found.isfinite(), known)
    scale = float(expected[known].abs().max())
    torch.testing.assert_close(found[known], expected[known], rtol=0, atol=1e-4 * scale)


@pytest.mark.parametrize("cuts", [[50], [1] * 50, [17, 1, 1, 3, 20, 8]], ids=["whole", "one by one", "chunks"])
def test_the_formula(case: Case, cuts: list[int]) -> None:
    head = case.build()
    kv, blocks = allocate(head), BlockPool(NUM_BLOCKS, BLOCK_SIZE)
    ids, hidden = torch.randint(VOCAB, (50,)), torch.randn(50, case.num_states * WIDTH)
    expected_logits, expected_left = case.reference(ids, case.reference.enter(hidden))
    seq = Sequence(1, ids.tolist(), SamplingParams(max_tokens=1))
    for num in cuts:
        span = slice(seq.computed, seq.computed + num)
        assert blocks.grow(seq, num)
        batch = build_batch(Step([seq], [num]), BLOCK_SIZE, ops().to_device)
        batch = replace(batch, logits_rows=torch.arange(num))
        own, left = head.forward(batch, head.enter(hidden[span]), kv)
        logits = torch.full((num, VOCAB), -torch.inf)
        logits[:, slice(None) if head.target_ids is None else head.target_ids] = own
        close(logits, expected_logits[span])
        close(left, expected_left[span])
        seq.computed += num


class World:
    """A drafter over the case's head, and sequences whose hidden states are random."""

    def __init__(self, case: Case, captured: bool = True, max_batch_tokens: int = 64) -> None:
        head = case.build()
        self.case, self.kv = case, allocate(head)
        self.blocks = BlockPool(NUM_BLOCKS, BLOCK_SIZE)
        options = CaptureOptions(enabled=captured, block_size=BLOCK_SIZE)
        self.runner = HeadRunner(head, self.kv, ops(), options, 0, max_batch_tokens)
        config = EngineConfig(max_batch_tokens=max_batch_tokens, max_num_seqs=8)
        self.drafter = HeadDrafter(config, DraftHead(self.runner, self.blocks, 200))
        self.hidden = {seed: self.states(seed) for seed in range(4)}

    def states(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(200, self.case.num_states * WIDTH, generator=generator)

    def seq(self, seq_id: int, prompt_ids: list[int], **params: Any) -> Sequence:
        return Sequence(seq_id, prompt_ids, SamplingParams(**{"max_tokens": 99, "temperature": 0} | params))

    def show(self, seqs: list[Sequence], spans: list[range], hidden: list[int]) -> None:
        """One step's states, with some of others in between."""
        parts, rows, start = [], [], 0
        for span, seed in zip(spans, hidden, strict=True):
            rows.append(start)
            parts += [self.hidden[seed][span.start : span.stop], torch.full((2, self.case.num_states * WIDTH), 9.0)]
            start += len(span) + 2
        self.drafter.observe(seqs, spans, rows, torch.cat(parts))

    def expected(self, seq: Sequence, num: int, hidden: int, base: int = 0) -> list[int]:
        """The head applied to all tokens from `base` on, and then to what it says itself."""
        reference, tokens = self.case.reference, seq.tokens(base, seq.num_tokens)
        states = reference.enter(self.hidden[hidden][base : seq.num_tokens - 1])
        said: list[int] = []
        for _ in range(num):
            logits, left = reference(torch.tensor([*tokens[1:], *said]), states)
            said.append(int(logits[-1].argmax()))
            states = torch.cat([states, left[-1:]])
        return said


@pytest.mark.parametrize("captured", [True, False])
@pytest.mark.parametrize("room", [64, 8])
def test_drafts_are_the_head_applied_again_and_again(case: Case, captured: bool, room: int) -> None:
    """However the states come, and whatever the model then says."""
    world = World(case, captured, room)
    a, b = world.seq(1, list(range(20, 57))), world.seq(2, [5, 6, 7])
    for start in range(0, 37, 6):
        world.show([a], [range(start, min(37, start + 6))], [0])
    world.show([b], [range(3)], [1])
    a.output_ids, b.output_ids = [11], [12]
    for turn in range(12):
        drafts = [draft.ids for draft in world.drafter.propose([a, b], [5, 1 + turn % 4])]
        assert drafts == [world.expected(a, 5, 0), world.expected(b, 1 + turn % 4, 1)]
        assert [draft.ids for draft in world.drafter.propose([b, a], [2, 0])] == [world.expected(b, 2, 1), []]
        for seq, draft, seed in ((a, drafts[0], 0), (b, drafts[1], 1)):
            start = seq.num_tokens - 1
            said = [*draft[: turn % 3], 30 + turn]
            world.show([seq], [range(start, start + len(said))], [seed])  # before they are output
            seq.output_ids += said
    forward: Any = world.runner._forward  # replays, where there are compiled kernels
    assert bool(getattr(forward, "captures", True)) == (captured or not hasattr(forward, "captures"))
    for seq in (a, b):
        world.drafter.forget(seq)
    world.blocks.check()
    assert world.blocks.num_used == 0


def test_states_that_come_again_or_too_late(case: Case) -> None:
    world = World(case)
    again, late = world.seq(1, list(range(20, 60))), world.seq(2, list(range(20, 60)))
    world.show([again], [range(30)], [0])
    world.show([again], [range(10, 40)], [0])
    again.output_ids = [3]
    assert world.drafter.propose([again], [4])[0].ids == world.expected(again, 4, 0)
    world.show([late], [range(24, 40)], [0])  # its own text, found from here on in the head's cache
    late.output_ids = [4]
    assert world.drafter.propose([late], [4])[0].ids == world.expected(late, 4, 0)
    other = world.seq(3, [1, *range(21, 60)])  # not the same text: the head begins where the states do
    world.show([other], [range(24, 40)], [2])
    other.output_ids = [5]
    assert world.drafter.propose([other], [4])[0].ids == world.expected(other, 4, 2, base=24)
    other.output_ids += [6, 7]  # states are missing
    assert world.drafter.propose([other], [4])[0].ids == []
    world.show([other], [range(42, 43)], [2])  # and are again there from here on
    other.output_ids.append(8)
    assert world.drafter.propose([other, again], [3, 2])[0].ids == world.expected(other, 3, 2, base=42)


def test_blocks_that_are_short_are_taken_from_those_not_asked_for(case: Case) -> None:
    world = World(case)
    world.blocks = world.drafter._blocks = BlockPool(4, BLOCK_SIZE)
    seqs = [world.seq(i, [i + 1] * 30) for i in range(3)]
    for seq in seqs:
        world.show([seq], [range(30)], [seq.id])
        seq.output_ids = [9]
        assert world.drafter.propose([seq], [4])[0].ids == world.expected(seq, 4, seq.id)
    assert world.drafter.propose(seqs, [4, 4, 4])[0].ids == []
    world.show(seqs[:1], [range(30, 31)], [0])  # one that had to give its blocks away begins anew
    seqs[0].output_ids.append(7)
    assert world.drafter.propose(seqs[:1], [4])[0].ids == world.expected(seqs[0], 4, 0, base=30)
    for seq in seqs:
        world.drafter.forget(seq)
    world.blocks.check()
    assert world.blocks.num_used == 0


def test_what_is_drawn_depends_on_the_draft_so_far(case: Case) -> None:
    """Penalties see drafted tokens, and a draft that was not taken leaves no trace in them."""
    world = World(case)
    seq = world.seq(1, list(range(20, 40)), frequency_penalty=2.0, presence_penalty=2.0, logit_bias={50: 30.0})
    world.show([seq], [range(20)], [0])
    seq.output_ids = [50]
    first = world.drafter.propose([seq], [4])[0].ids
    assert first.count(50) > 1  # the bias is stronger than the penalties, which add up
    assert world.drafter.propose([seq], [4])[0].ids == first


def test_states_that_nobody_asks_for_are_not_computed_with(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """They wait for a while; who asks later gets drafts from the last of them on."""
    world = World(case)
    soon, late = world.seq(1, list(range(20, 50))), world.seq(2, list(range(30)))
    world.show([soon, late], [range(30)] * 2, [0, 1])
    soon.output_ids, late.output_ids = [9], [9]
    assert world.drafter.propose([soon, late], [2, 2])[1].ids == world.expected(late, 2, 1)
    monkeypatch.setattr(world.runner, "run", lambda *_: pytest.fail("it has computed places"))
    for end in range(30, 30 + MOST_UNREAD + 1):
        world.show([soon, late], [range(end, end + 1)] * 2, [0, 1])
        soon.output_ids.append(end % 7)
        late.output_ids.append(end % 5)
        if end == 70:
            assert world.drafter.propose([soon], [3])[0].ids == world.expected(soon, 3, 0)
    drafts = [draft.ids for draft in world.drafter.propose([soon, late], [3, 3])]
    assert drafts == [world.expected(soon, 3, 0), world.expected(late, 3, 1, base=30 + MOST_UNREAD + 1 - KEPT)]
    for seq in (soon, late):
        world.drafter.forget(seq)
    assert world.blocks.num_used == 0


@pytest.mark.parametrize("params", [{}, {"temperature": 1.0, "top_k": 9}])
def test_the_host_waits_once_for_a_draft(case: Case, monkeypatch: pytest.MonkeyPatch, params: dict[str, Any]) -> None:
    """However many tokens it has; and never while it reads hidden states."""
    nums = []
    for limit in (1, 5):
        world = World(case)
        seqs = [world.seq(i, list(range(i, 23 + i)), **params) for i in range(3)]
        nums.append(count_fetches(monkeypatch, lambda: world.show(seqs, [range(23)] * 3, [0, 1, 2])))  # noqa: B023
        for seq in seqs:
            seq.output_ids = [9]
        nums.append(count_fetches(monkeypatch, lambda: world.drafter.propose(seqs, [limit, 1, limit])))  # noqa: B023
    assert nums == [0, 1, 0, 1]
