"""Which matrix is quantised how: `config_groups` of a compressed-tensors checkpoint."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from blade import CheckpointError
from blade.nn import Keys
from blade.nn.format_settings import read_settings, unserved
from blade.nn.module_patterns import ModulePatterns
from blade.nn.packing import KEPT

if TYPE_CHECKING:
    from collections.abc import Mapping

log = logging.getLogger("blade.formats")

PATH = "quantization_config."
LINEAR = "Linear"  # a target: every linear
EXTENTS = ("tensor", "channel", "group", "tensor_group", "block")
PACKED = {"pack-quantized": "int", "nvfp4-pack-quantized": "float", "mxfp4-pack-quantized": "float"}  # and their type
BYTES = {"int-quantized": "int", "float-quantized": "float", "naive-quantized": "", "mxfp8-quantized": "float"}
WEIGHT_KEYS = {  # beside those read: what the scales' dtypes are is seen from the tensors
    "num_bits", "type", "symmetric", "strategy", "group_size", "block_structure", "actorder", "observer",
    "observer_kwargs", "zp_dtype",
}  # fmt: skip


@dataclass(slots=True, frozen=True)
class Scheme:
    """How the matrices of one group are kept."""

    format: str
    type: str  # "int" or "float"
    bits: int
    symmetric: bool
    extent: str  # of a scale: one of EXTENTS
    group: int  # numbers of a row that share a scale, for "group" and "tensor_group"
    block: tuple[int, int]  # rows and columns that do, for "block"

    @property
    def description(self) -> str:
        """ "int3 in groups of 128, kept as 4"."""
        extents = {
            "tensor": "whole matrices",
            "channel": "whole rows",
            "block": f"blocks of {self.block[0]} by {self.block[1]}",
        }
        kept = "" if self.type == "float" or KEPT[self.bits] == self.bits else f", kept as {KEPT[self.bits]}"
        number = f"{'int' if self.type == 'int' else 'fp'}{self.bits}"
        return f"{number} in {extents.get(self.extent, f'groups of {self.group}')}{kept}"


class Schemes:
    """The groups, asked by module."""

    def __init__(self, keys: Keys, settings: Mapping[str, Any]) -> None:
        self._exact: dict[str, Scheme] = {}
        self._patterns: ModulePatterns[Scheme] = ModulePatterns()
        self._linear: Scheme | None = None
        self._known: dict[str, Scheme | None] = {}
        self.all: list[Scheme] = []
        for name, group in keys.objects("config_groups"):
            path = f"{PATH}config_groups.{name}."
            if group.get("weights") is not None:
                scheme = _read(group, path, settings.get("format"))
                self.all.append(scheme)
                self._aim(scheme, Keys(group, path).texts("targets"), path)
            _tell_of_activations(group, path)
        if not self.all:
            raise CheckpointError(f"config.json: {PATH}config_groups quantises no weights.")

    def of(self, prefix: str) -> Scheme:
        """That of the module, by its name, by the first pattern that it matches, or by being a linear. Raises
        CheckpointError where no group is meant for it."""
        if prefix not in self._known:
            only = self.all[0] if len(self.all) == 1 else None
            self._known[prefix] = self._exact.get(prefix) or self._patterns.find(prefix) or self._linear or only
        scheme = self._known[prefix]
        if scheme is None:
            raise CheckpointError(f"config.json: no group of {PATH}config_groups has {prefix} for a target.")
        return scheme

    def _aim(self, scheme: Scheme, targets: list[str], path: str) -> None:
        for target in targets:
            if target.startswith("re:"):
                self._patterns.add(f"{path}targets", target.removeprefix("re:"), scheme)
            elif target == LINEAR:
                self._linear = self._linear or scheme
            else:
                self._exact.setdefault(target, scheme)


def _read(group: dict[str, Any], path: str, common: object) -> Scheme:
    kind = group.get("format") or common
    if not isinstance(kind, str) or kind not in {**PACKED, **BYTES}:
        raise unserved(f"{path}format", kind)
    keys = read_settings(
        Keys(group, path).section("weights").values, WEIGHT_KEYS, {"dynamic": (False,)}, f"{path}weights."
    )
    numbers = keys.text("type", "int")
    wanted = {**PACKED, **BYTES}[kind]
    if numbers not in ("int", "float") or (wanted and numbers != wanted):
        keys.refuse("type", f'"{wanted or "int or float"}" for {kind}')
    bits, extent, size, block = keys.integer("num_bits", 8), _extent(keys), 0, (1, 1)
    if (numbers == "float" and bits != (4 if kind in PACKED else 8)) or bits not in KEPT:
        keys.refuse("num_bits", f"what {kind} can be")
    if extent in ("group", "tensor_group"):
        size = keys.integer("group_size", 128)
    elif kind in PACKED and numbers == "float":
        keys.refuse("strategy", f"group or tensor_group for {kind}")
    if extent == "block":
        block = _block_of_text(keys.values.get("block_structure")) or _block(keys)
    return Scheme(kind, numbers, bits, keys.flag("symmetric", True), extent, size, block)


def _extent(keys: Keys) -> str:
    """The strategy; without one the size of a group tells."""
    if keys.has("strategy"):
        if keys.text("strategy") not in EXTENTS:
            keys.refuse("strategy", f"one of {', '.join(EXTENTS)}")
        return keys.text("strategy")
    if not keys.has("group_size"):
        return "tensor"
    return "channel" if keys.integer("group_size", minimum=-1) == -1 else "group"


def _block(keys: Keys) -> tuple[int, int]:
    sizes = keys.sizes("block_structure")
    if len(sizes) != 2:
        keys.refuse("block_structure", "two integers")
    return sizes[0], sizes[1]


def _block_of_text(text: object) -> tuple[int, int] | None:
    """Of "128x128", as a block was once written; None for what is no such text."""
    match = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", text) if isinstance(text, str) else None
    return (int(match[1]), int(match[2])) if match else None


def _tell_of_activations(group: dict[str, Any], path: str) -> None:
    for key in ("input_activations", "output_activations"):
        if group.get(key) is not None:
            log.info("config.json: %s%s is not needed: activations keep more bits than it asks for", path, key)
