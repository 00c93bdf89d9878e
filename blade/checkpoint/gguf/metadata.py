"""Checked access to a GGUF file's metadata: a wrong value is reported by its key."""

from __future__ import annotations

import math
import reprlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from blade.checked import CheckedValues
from blade.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class Metadata(CheckedValues):
    """Key-value pairs; keys without a known group are of the file's architecture: "block_count" is "llama.block_count".

    An absent key without a default is an error. Every method raises CheckpointError, which names file and key.
    """

    path: Path
    values: Mapping[str, Any]

    @property
    def arch(self) -> str:
        return self.text("general.architecture")

    def has(self, key: str) -> bool:
        return self._full(key) in self.values

    def number(self, key: str, default: float | None = None, minimum: float = 0.0, maximum: float = math.inf) -> float:
        """As it says, with the seven digits that a float32 holds: 1e-06, not 9.99999997e-07."""
        value = super(Metadata, self).number(key, default, minimum, maximum)  # a dataclass with slots: no bare super()
        return float(f"{value:.7g}")

    def array(self, key: str, kind: type) -> list[Any]:
        """Empty when absent. GGUF's arrays are of one kind, so the first item tells that of all."""
        value = self.values.get(self._full(key), [])
        if type(value) is not list or (value and type(value[0]) is not kind):
            self.refuse(key, f"a list of {kind.__name__}")
        return value

    def refuse(self, key: str, wanted: str) -> NoReturn:
        found = reprlib.repr(self.values.get(self._full(key)))
        raise CheckpointError(f"{self.path}: {self._full(key)} must be {wanted}, not {found}.")

    def _full(self, key: str) -> str:
        return key if key.startswith(("general.", "tokenizer.")) else f"{self.arch}.{key}"

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(self._full(key), default)
        if value is None:
            raise CheckpointError(f"{self.path} has no key {self._full(key)}.")
        return value
