"""Recorded decode steps over the emulator: a real decoder with our kernels, taped once, replayed on padded batches."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch

import blade_qwen
from blade import CaptureOptions, KVSpec
from blade.contracts import NORMED
from blade.nn import Loader
from blade.plugins import Plugins
from blade.testing.attention import make_batch
from blade_native import paged_attention
from blade_native.cuda.graphs import GraphedForward
from blade_native.cuda.ops import CudaOps
from blade_native.reference import TorchOps

from .recorder import TapeRecorder

if TYPE_CHECKING:
    from torch import Tensor

    from blade import Batch
    from blade_native.cuda.launch import Launcher

pytestmark = pytest.mark.timeout(600)  # whoever comes first waits for the compiler
BLOCK_SIZE, MAX_CONTEXT, SIZES = 16, 96, (1, 2, 4)
OPTIONS = CaptureOptions(batch_sizes=SIZES, block_size=BLOCK_SIZE, max_context=MAX_CONTEXT)
PROMPTS = (20, 5, 33)  # tokens; each sequence lives in blocks of its own
TABLES = [[7, 2, 4], [1], [6, 0, 3]]
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"], "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64, "vocab_size": 199, "rms_norm_eps": 1e-6,
    "max_position_embeddings": MAX_CONTEXT, "tie_word_embeddings": True, "hidden_act": "silu",
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
}  # fmt: skip


class RandomWeights:
    """contracts.Weights of any names, of the shapes that a Qwen2 of CONFIG has."""

    OUTER, INNER, HEADS, KV = 64, 96, 128, 64

    def names(self) -> list[str]:
        parts = ["input_layernorm", "post_attention_layernorm", *(f"self_attn.{x}_proj" for x in "qkvo")]
        parts += [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
        layers = [f"model.layers.{i}.{part}" for i in range(2) for part in parts]
        return [f"{name}.weight" for name in ("model.embed_tokens", "model.norm", *layers)]

    def shape(self, name: str) -> tuple[int, ...]:
        kind = name.split(".")[-2]
        return {
            "embed_tokens": (199, self.OUTER), "q_proj": (self.HEADS, self.OUTER), "k_proj": (self.KV, self.OUTER),
            "v_proj": (self.KV, self.OUTER), "o_proj": (self.OUTER, self.HEADS), "gate_proj": (self.INNER, self.OUTER),
            "up_proj": (self.INNER, self.OUTER), "down_proj": (self.OUTER, self.INNER),
        }.get(kind, (self.OUTER,))  # fmt: skip

    def get(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        x = torch.randn(self.shape(name), generator=torch.Generator().manual_seed(len(name)))
        return (x * 0.2 if x.dim() == 2 else 1 + 0.1 * x).to(dtype or torch.float32)

    def release(self, names: Iterable[str]) -> None:
        """They are made anew each time."""


class World:
    """One model, a cache for it alone, and the recorder that its graphs were made with."""

    def __init__(self, launcher: Launcher) -> None:
        self.ops = CudaOps(TorchOps(), launcher)
        self.attention = paged_attention(self.ops)
        architecture = Plugins({"qwen": blade_qwen}).registry("register_models").create("Qwen2ForCausalLM")
        config = architecture.configure(CONFIG)
        self.model = architecture.build(config, Loader(RandomWeights(), self.ops, self.attention, torch.bfloat16))
        self.spec = KVSpec(2, 2, 1, 64, "bfloat16", BLOCK_SIZE)
        self.kv = self.attention.allocate(self.spec, 8)
        self.recorder = TapeRecorder(launcher)

    def graphed(self) -> GraphedForward:
        device = torch.device("cpu")
        return GraphedForward(self.model, self.kv, OPTIONS, self.recorder, device)

    def batch(self, spans: dict[int, tuple[int, int]]) -> Batch:
        """Tokens [start, stop) of each sequence."""
        made = make_batch([TABLES[i] for i in spans], list(spans.values()), BLOCK_SIZE, self.ops)
        ids = [(31 * i + 7 * at) % 199 for i, (start, stop) in spans.items() for at in range(start, stop)]
        return replace(made, input_ids=torch.tensor(ids))


def decodes(*seqs: int, after: int) -> dict[int, tuple[int, int]]:
    return {i: (PROMPTS[i] + after, PROMPTS[i] + after + 1) for i in seqs}


@torch.inference_mode()
def test_replays_are_the_steps_they_stand_for(launcher: Launcher) -> None:
    plain, world = World(launcher), World(launcher)
    model, recorder = world.graphed(), world.recorder
    assert not any(layer.kv.any() for layer in world.kv)  # recording stored nothing
    steps = [
        {i: (0, length) for i, length in enumerate(PROMPTS)},
        decodes(0, 1, 2, after=0),  # padded from 3 to 4
        decodes(2, 0, after=1),  # other sequences in other rows, nothing left of the third
        decodes(1, after=1),
        decodes(1, 2, 0, after=2),
    ]
    counts = []
    for spans in steps:
        expected = plain.model.forward(plain.batch(spans), plain.kv)
        found = model(world.batch(spans))
        torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
        counts.append(recorder.replays)
    assert counts == [0, 1, 2, 3, 4]
    for layer, other in zip(world.kv, plain.kv, strict=True):
        torch.testing.assert_close(layer.kv, other.kv, rtol=0.02, atol=0.02)  # padding rows stored nothing


@torch.inference_mode()
def test_replays_leave_hidden_states_too(launcher: Launcher) -> None:
    """In memory of the reader's: what a padded replay leaves behind its sequences' rows is of no meaning."""
    plain, world = World(launcher), World(launcher)
    shown = []
    for each in (plain, world):
        shown.append(torch.zeros(64, 3 * 64, dtype=torch.bfloat16))
        each.model.show_hidden((0, 1, NORMED), shown[-1])
    model = world.graphed()
    for spans in ({i: (0, length) for i, length in enumerate(PROMPTS)}, decodes(2, 0, 1, after=0)):
        expected, found = plain.model.forward(plain.batch(spans), plain.kv), model(world.batch(spans))
        torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
        num = sum(stop - start for start, stop in spans.values())
        torch.testing.assert_close(shown[1][:num], shown[0][:num], rtol=0.02, atol=0.05)
        assert shown[0][:num].abs().amax(1).gt(0).all()
    assert world.recorder.replays == 1


@torch.inference_mode()
def test_what_is_replayed(launcher: Launcher) -> None:
    world = World(launcher)
    model = world.graphed()
    assert [model.size_for(world.batch(decodes(*seqs, after=0))) for seqs in ((0,), (0, 1), (0, 1, 2))] == [1, 2, 4]
    decode = world.batch(decodes(0, 1, after=0))
    mixed = world.batch(decodes(0, after=0) | {1: (0, 3)})
    without_logits = replace(decode, logits_rows=decode.logits_rows[:1])  # one of them is a chunk of a prompt
    tree = replace(world.batch({0: (20, 22)}), ancestors=torch.tensor([1, 3]))
    too_many = replace(decode, query_lens=[1] * 5, logits_rows=torch.arange(5))
    too_long = replace(decode, block_tables=torch.zeros(2, 7, dtype=torch.int32))
    assert [model.size_for(batch) for batch in (mixed, without_logits, tree, too_many, too_long)] == [None] * 5


def test_graphs_hold_our_launches_in_order(launcher: Launcher) -> None:
    world = World(launcher)
    world.graphed()
    assert len(world.recorder.tapes) == len(SIZES)
    for tape in world.recorder.tapes:
        names = [entry.kernel.name.split("<")[0] for entry in tape if hasattr(entry, "kernel")]
        layer = ["rope_and_store", "paged_decode", "add_rms_norm", "silu_mul", "add_rms_norm"]
        assert [name for name in names if name != "merge_chunks"] == ["rms_norm", *layer, *layer]


def test_a_wait_for_the_device_cannot_be_recorded(launcher: Launcher) -> None:
    recorder = TapeRecorder(launcher)
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        recorder.record(lambda: torch.ones(3) * torch.ones(1).item())
    assert launcher.cupy.capture is None


def test_without_a_device_steps_are_not_recorded(launcher: Launcher, caplog: pytest.LogCaptureFixture) -> None:
    world = World(launcher)
    with caplog.at_level(logging.WARNING):
        forward = world.ops.capture(world.model, world.kv, OPTIONS)
    assert not isinstance(forward, GraphedForward)
    batch = world.batch(decodes(0, 1, after=0))
    assert torch.equal(forward(batch), world.model.forward(batch, world.kv))
    assert "kernel by kernel" in caplog.text
