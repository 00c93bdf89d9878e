"""contracts.Quantization of GPTQ (Frantar et al. 2023): 2, 3, 4 or 8 bits, with zeros or without, in any order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from blade.nn import Keys
from blade.nn.format_settings import group_of, read_settings, unserved
from blade.nn.module_patterns import ModulePatterns
from blade.nn.packing import KEPT
from blade.nn.words import GPTQWords, WordQuantization

if TYPE_CHECKING:
    from collections.abc import Mapping

BITS = (2, 3, 4, 8)
FORMATS = ("gptq", "gptq_v2")
PATH = "quantization_config."
FIXED = {  # what these other values say, the tensors are not
    "adapter": (),
    "rotation": (),
    "is_marlin_format": (False,),
    "use_exllama_layout": (False,),
    "pack_dtype": ("int32", "torch.int32"),
    "data_type": ("int",),
    "act_bits": (16, 32),
}
KNOWN = {"bits", "group_size", "sym", "desc_act", "checkpoint_format", "format", "method", "dynamic", "lm_head"}


class GPTQ(WordQuantization):
    """One layout for all matrices, unless `dynamic` says otherwise."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        keys = read_settings(settings, KNOWN, FIXED)
        self._words = _words(keys, settings, _version(settings))
        self._overrides = _overrides(keys, settings, _version(settings))
        self._known: dict[str, GPTQWords] = {}
        self.label = f"gptq, {describe(self._words)}{' (most of them)' if self._overrides else ''}"

    def layout(self, prefix: str) -> GPTQWords:
        if prefix not in self._known:
            self._known[prefix] = self._overrides.find(prefix) or self._words
        return self._known[prefix]


def describe(words: GPTQWords) -> str:
    """ "3 bits in groups of 128, kept as 4"."""
    group = f"groups of {words.group}" if words.group else "whole rows"
    kept = "" if KEPT[words.bits] == words.bits else f", kept as {KEPT[words.bits]}"
    return f"{words.bits} bits in {group}{kept}"


def _version(settings: Mapping[str, Any]) -> str:
    version = settings.get("checkpoint_format") or settings.get("format") or FORMATS[0]
    if version not in FORMATS:
        raise unserved(f"{PATH}checkpoint_format", version)
    return str(version)


def _words(keys: Keys, settings: Mapping[str, Any], version: str) -> GPTQWords:
    bits = keys.integer("bits")
    if bits not in BITS:
        keys.refuse("bits", f"one of {', '.join(map(str, BITS))}")
    return GPTQWords(bits, group_of(keys), keys.flag("sym", True), less_one=version == FORMATS[0])


def _overrides(keys: Keys, settings: Mapping[str, Any], version: str) -> ModulePatterns[GPTQWords]:
    """Settings of some modules that differ (`dynamic`). Those that begin with "-:" name modules that stay plain: that
    is seen from their tensors."""
    overrides: ModulePatterns[GPTQWords] = ModulePatterns()
    for pattern, changed in keys.objects("dynamic") if settings.get("dynamic") is not False else ():
        if not pattern.startswith("-:"):
            own = Keys({**settings, **changed}, f"{PATH}dynamic.{pattern}.")
            overrides.add(f"{PATH}dynamic", pattern.removeprefix("+:"), _words(own, settings, version))
    return overrides
