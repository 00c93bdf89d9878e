"""contracts.Quantization of AutoRound (Cheng et al. 2024), whose matrices lie as GPTQ's or AWQ's do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from blade.nn import Keys
from blade.nn.format_settings import group_of, read_settings, unserved
from blade.nn.module_patterns import ModulePatterns
from blade.nn.packing import KEPT
from blade.nn.words import AWQWords, GPTQWords, WordQuantization

if TYPE_CHECKING:
    from collections.abc import Mapping

PATH = "quantization_config."
BITS = (2, 3, 4, 8)
LESS_ONE = ("auto_round:auto_gptq", "auto_round:gptq")  # zeros are stored less 1
AS_IT_IS = ("auto_round", "auto_round:exllamav2", "auto_round:triton", "auto_round:gptqmodel")
AWQ = ("auto_round:auto_awq", "auto_round:awq")
FIXED: dict[str, Any] = {"data_type": ("int",), "act_bits": (16, 32), "rotation_config": ({},)}
ACTIVATIONS = {"act_data_type", "act_dynamic", "act_group_size", "act_sym"}  # mean nothing without act_bits
KNOWN = {"bits", "group_size", "sym", "packing_format", "extra_config"}


class AutoRound(WordQuantization):
    """One layout for all matrices, unless `extra_config` says otherwise."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        keys = read_settings(settings, KNOWN | ACTIVATIONS, FIXED)
        self._packing = keys.text("packing_format", LESS_ONE[0])
        if self._packing not in (*LESS_ONE, *AS_IT_IS, *AWQ):
            raise unserved(f"{PATH}packing_format", self._packing)
        self._words = self._make(keys)
        self._named: dict[str, GPTQWords | AWQWords] = {}
        self._patterns: ModulePatterns[GPTQWords | AWQWords] = ModulePatterns("search")
        for name, changed in keys.objects("extra_config"):
            if changed.get("bits", 0) != 16:  # those stay plain, as is seen from their tensors
                words = self._make(Keys({**settings, **changed}, f"{PATH}extra_config.{name}."))
                self._named[name] = words
                self._patterns.add(f"{PATH}extra_config", name, words)
        bits = keys.integer("bits")
        kept = "" if KEPT[bits] == bits else f", kept as {KEPT[bits]}"
        self.label = f"auto-round, {bits} bits{' (most of them)' if self._named else ''}{kept}"

    def layout(self, prefix: str) -> GPTQWords | AWQWords:
        if prefix not in self._named:
            self._named[prefix] = self._patterns.find(prefix) or self._words
        return self._named[prefix]

    def _make(self, keys: Keys) -> GPTQWords | AWQWords:
        bits, group = keys.integer("bits"), group_of(keys)
        if self._packing in AWQ:
            if bits != 4:
                keys.refuse("bits", "4 in AWQ's layout")
            return AWQWords(group)
        if bits not in BITS:
            keys.refuse("bits", f"one of {', '.join(map(str, BITS))}")
        return GPTQWords(bits, group, keys.flag("sym", True), less_one=self._packing in LESS_ONE)
