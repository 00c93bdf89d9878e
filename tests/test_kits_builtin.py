"""Our own plugins pass the kits that third parties are given."""

import importlib
from pathlib import Path

import pytest
import torch

from blade import CaptureOptions
from blade.contracts import DraftModel
from blade.engine.blocks import BlockPool
from blade.engine.runner import ModelRunner
from blade.plugins import discover, load
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

BUILTINS = [info.module for info in discover() if info.builtin]
PLUGINS = load()
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


@pytest.mark.parametrize("name", DRAFTERS)
def test_drafter(name: str) -> None:
    check_drafter(DRAFTERS[name], draft_model=fake_draft_model())


@pytest.mark.parametrize("device", DEVICES)
def test_ops(device: str) -> None:
    check_ops(BACKENDS[device](1), [torch.float32, torch.bfloat16])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ATTENTION)
def test_attention(name: str, device: str) -> None:
    check_attention(ATTENTION[name], BACKENDS[device](1), [torch.float32, torch.bfloat16])


def test_tokenizer(tiny_llama: Path) -> None:
    check_tokenizer(load_tokenizer(tiny_llama))
