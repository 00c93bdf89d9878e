"""What the composition root refuses before anything heavy is loaded."""

from __future__ import annotations

import pytest

from blade import Config, ConfigError, EngineConfig
from blade.assembly import _check_kv_cache
from blade_native.attention import PagedAttention
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
