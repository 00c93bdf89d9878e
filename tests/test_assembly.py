"""What the composition root refuses before anything heavy is loaded."""

from __future__ import annotations

import logging

import pytest

from blade import Config, ConfigError, DualChunks, EngineConfig, KeySelection, ModelConfig, ModelOptions
from blade.assembly.choosing import _check_kv_cache, _max_context
from blade_native.attention import PagedAttention
from blade_native.cuda.attention import CudaAttention
from blade_native.reference import TorchOps

OPS = TorchOps()


class Plain:
    """An attention of a plugin's that knows nothing of storages."""


def check(attention: object, quant: str) -> None:
    _check_kv_cache(Config(engine=EngineConfig(kv_cache_quant=quant, attention="mine")), attention, OPS)  # type: ignore[arg-type]


def test_a_rounded_kv_cache_needs_an_attention_that_has_it() -> None:
    check(Plain(), "none")
    check(PagedAttention(OPS.device), "int8")
    with pytest.raises(ConfigError, match=r"int8 is not possible with --attention mine on torch\. Use none\."):
        check(Plain(), "int8")
    with pytest.raises(ConfigError, match=r"int3 .* Use none or int8 or .* or int4\."):
        check(PagedAttention(OPS.device), "int3")


def test_chunks_of_positions_need_an_attention_that_has_them(caplog: pytest.LogCaptureFixture) -> None:
    model = ModelConfig("X", 10, 4096, 1, 1, 1, 16, attention_chunk=512)
    asked = Config(model=ModelOptions(max_model_len=600), engine=EngineConfig(attention="mine"))
    assert _max_context(Config(), model, PagedAttention(OPS.device)) == 4096
    assert not caplog.text
    with caplog.at_level(logging.WARNING, "blade.assembly"):
        assert _max_context(Config(), model, Plain()) == 512  # type: ignore[arg-type]
    assert "512 tokens" in caplog.text
    assert _max_context(asked, model, PagedAttention(OPS.device)) == 600
    with pytest.raises(ConfigError, match=r"one chunk that --attention mine can do of 512\. Use at most 512\."):
        _max_context(asked, model, Plain())  # type: ignore[arg-type]


def test_dual_chunks_need_an_attention_that_has_them(caplog: pytest.LogCaptureFixture) -> None:
    model = ModelConfig("X", 10, 4096, 1, 1, 1, 16, dual_chunks=DualChunks(500, 512))
    for attention in (PagedAttention(OPS.device), CudaAttention.__new__(CudaAttention)):
        assert _max_context(Config(), model, attention) == 4096
    assert not caplog.text
    with caplog.at_level(logging.WARNING, "blade.assembly"):
        assert _max_context(Config(), model, Plain()) == 513  # type: ignore[arg-type]
    assert "limited to the one chunk that --attention paged can do, of 513 tokens" in caplog.text


def test_chosen_keys_need_an_attention_that_sees_them_alone(caplog: pytest.LogCaptureFixture) -> None:
    model = ModelConfig("X", 10, 4096, 1, 1, 1, 16, key_selection=KeySelection(4, 16, group=4, budget=512))
    for attention in (PagedAttention(OPS.device), CudaAttention.__new__(CudaAttention)):
        assert _max_context(Config(), model, attention) == 4096
    assert not caplog.text
    with caplog.at_level(logging.WARNING, "blade.assembly"):
        assert _max_context(Config(), model, Plain()) == 515  # type: ignore[arg-type]
    assert "limited to the attention to all keys that --attention paged can do, of 515 tokens" in caplog.text
