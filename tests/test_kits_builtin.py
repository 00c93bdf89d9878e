"""Our own plugins pass the kits that third parties are given."""

import importlib
from pathlib import Path

import pytest
import torch

from blade import Batch, CaptureOptions, KVCache, ModelConfig
from blade.contracts import DraftHead, DraftModel
from blade.engine.blocks import BlockPool
from blade.engine.head_runner import HeadRunner
from blade.engine.runner import ModelRunner
from blade.plugins import load
from blade.testing import (
    FakeModel,
    check_attention,
    check_drafter,
    check_ops,
    check_plugin,
    check_scheduler,
    check_tokenizer,
)
from blade.text.tokenizer import load_tokenizer

PLUGINS = load()
BUILTINS = [info.module for info in PLUGINS.table() if info.builtin]
SCHEDULERS = PLUGINS.registry("register_schedulers")
DRAFTERS = PLUGINS.registry("register_drafters")
ATTENTION = PLUGINS.registry("register_attention")
BACKENDS = PLUGINS.registry("register_backends")
DEVICES = [name for name in BACKENDS if name != "cuda" or torch.cuda.is_available()]


@pytest.mark.parametrize("module", BUILTINS)
def test_plugin(module: str) -> None:
    check_plugin(importlib.import_module(module))


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_scheduler(name: str, seed: int) -> None:
    check_scheduler(SCHEDULERS[name], seed)


def fake_draft_model() -> DraftModel:
    model = FakeModel()
    runner = ModelRunner(model, model.allocate(64, 4), BACKENDS["cpu"](1), CaptureOptions(enabled=False, block_size=4))
    return DraftModel(runner, BlockPool(64, 4), model.config.max_context)


class FakeHead:
    """contracts.Head whose KV holds the ids, and whose guess is the id it was given, plus one."""

    config = ModelConfig("FakeHead", 260, 4096, 1, 1, 1, 1)
    hidden_states, width, dtype, target_ids = (1, 2), 8, torch.float32, None

    def enter(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden[:, :8] + hidden[:, 8:]

    def forward(self, batch: Batch, states: torch.Tensor, kv: KVCache) -> tuple[torch.Tensor, torch.Tensor]:
        assert not states.isnan().any()
        kv[0].view(-1)[batch.slots] = batch.input_ids
        rows = batch.logits_rows
        said = (batch.input_ids[rows] + 1) % 260
        return torch.nn.functional.one_hot(said, 260).float(), states[rows]


def fake_head() -> DraftHead:
    options = CaptureOptions(enabled=False, block_size=4)
    runner = HeadRunner(FakeHead(), FakeModel().allocate(64, 4), BACKENDS["cpu"](1), options, 0, 2048)
    return DraftHead(runner, BlockPool(64, 4), 4096)


@pytest.mark.parametrize("name", DRAFTERS)
def test_drafter(name: str) -> None:
    makes_heads = any(hasattr(DRAFTERS[name], how) for how in ("head", "draft_architectures"))
    check_drafter(DRAFTERS[name], draft_model=fake_head() if makes_heads else fake_draft_model(), hidden_size=8)


@pytest.mark.parametrize("device", DEVICES)
def test_ops(device: str) -> None:
    check_ops(BACKENDS[device](1), [torch.float32, torch.bfloat16])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ATTENTION)
def test_attention(name: str, device: str) -> None:
    check_attention(ATTENTION[name], BACKENDS[device](1), [torch.float32, torch.bfloat16])


def test_tokenizer(tiny_llama: Path) -> None:
    check_tokenizer(load_tokenizer(tiny_llama))
