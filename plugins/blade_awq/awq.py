"""contracts.Quantization of AWQ (Lin et al. 2024) in AutoAWQ's layout "gemm": 4 bits with zeros."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from blade.nn.format_settings import group_of, read_settings, unserved
from blade.nn.words import AWQWords, WordQuantization

if TYPE_CHECKING:
    from collections.abc import Mapping

FIXED: dict[str, Any] = {"bits": (4,), "w_bit": (4,), "act_bits": (16, 32), "data_type": ("int",)}
KNOWN = {"group_size", "q_group_size", "version", "zero_point", "sym"}


class AWQ(WordQuantization):
    """One layout for all matrices."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        keys = read_settings(settings, KNOWN, FIXED)
        version = keys.text("version", "gemm")
        if version.lower() != "gemm":
            raise unserved("quantization_config.version", version)
        group = group_of(keys, "q_group_size" if keys.has("q_group_size") else "group_size")
        self._words = AWQWords(group)
        self.label = f"awq, 4 bits in {f'groups of {group}' if group else 'whole rows'}"

    def layout(self, prefix: str) -> AWQWords:
        return self._words
