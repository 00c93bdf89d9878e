"""Checked access to config.json: a wrong value is reported by its key, not met later as an exception of torch's."""

from __future__ import annotations

import math
import reprlib
from typing import TYPE_CHECKING, Any, NoReturn

from blade.checked import MAX_EXPERTS, MAX_LAYERS, MAX_WIDTH, TEXT_SECTIONS, CheckedValues, is_number
from blade.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping


class Keys(CheckedValues):
    """A JSON object's values by key. null counts as absent; an absent key without a default is an error.

    Every method raises CheckpointError, which names the key.
    """

    def __init__(self, values: Mapping[str, Any], path: str = "") -> None:
        self.values = values
        self._path = path

    def num_layers(self) -> int:
        """`num_hidden_layers`, at most MAX_LAYERS."""
        return self.integer("num_hidden_layers", maximum=MAX_LAYERS)

    def num_experts(self, key: str) -> int:
        """At most MAX_EXPERTS."""
        return self.integer(key, maximum=MAX_EXPERTS)

    def heads(self, num: str, dim: str, width: int | None = None) -> tuple[int, int]:
        """How many, and channels of one, at most MAX_WIDTH together; without `dim` an equal share of `width`."""
        num_heads = self.integer(num, maximum=MAX_WIDTH)
        return num_heads, self.integer(dim, width and width // num_heads, maximum=MAX_WIDTH // num_heads)

    def flag(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        if type(value) is not bool:
            self.refuse(key, "true or false")
        return value

    def integers(self, key: str, default: list[int] | None = None) -> list[int]:
        """None of them below 0; maybe none at all."""
        value = self._get(key, default)
        if type(value) is not list or any(type(item) is not int or item < 0 for item in value):
            self.refuse(key, "a list of integers of at least 0")
        return value

    def texts(self, key: str, default: list[str] | None = None) -> list[str]:
        """At least one."""
        value = self._get(key, default)
        if type(value) is not list or not value or any(type(item) is not str for item in value):
            self.refuse(key, "a list of strings")
        return value

    def signed(self, key: str) -> float:
        """Finite, of either sign."""
        value = self._get(key, None)
        if not is_number(value):
            self.refuse(key, "a number")
        return float(value)

    def sizes(self, key: str) -> list[int]:
        """At least one, each at least 1."""
        value = self._get(key, None)
        if type(value) is not list or not value or any(type(item) is not int or item < 1 for item in value):
            self.refuse(key, "a list of positive integers")
        return value

    def numbers(self, key: str, minimum: float = 0.0, maximum: float = math.inf) -> list[float]:
        """At least one, each finite and above 0; where bounds are given, from one to the other."""
        value = self._get(key, None)
        sound = type(value) is list and value and all(is_number(item) and item > 0 for item in value)
        if not sound or not all(minimum <= item <= maximum for item in value):
            bounds = f"numbers from {minimum:g} to {maximum:.10g}" if maximum < math.inf else "positive numbers"
            self.refuse(key, f"a list of {bounds}")
        return [float(item) for item in value]

    def section(self, key: str) -> Keys:
        """The object under `key`, empty when absent."""
        value = self._get(key, {})
        if type(value) is not dict:
            self.refuse(key, "an object")
        return Keys(value, f"{self._path}{key}.")

    def of_text(self) -> Keys:
        """Those of the text model, in sections where the model sees or hears as well."""
        found = self
        for key in TEXT_SECTIONS:
            found = found.section(key) if found.has(key) else found
        return found

    def objects(self, key: str) -> list[tuple[str, dict[str, Any]]]:
        """The objects in the one under `key`, by their names; none when absent."""
        found = list(self.section(key).values.items())
        if any(type(value) is not dict for _, value in found):
            self.refuse(key, "an object of objects")
        return found

    def with_default(self, key: str, value: Any) -> Keys:
        """The same, with a value for the key where it has none."""
        return self if self.has(key) else Keys({**self.values, key: value}, self._path)

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def refuse(self, key: str, wanted: str) -> NoReturn:
        raise CheckpointError(
            f"config.json: {self._path}{key} must be {wanted}, not {reprlib.repr(self.values.get(key))}."
        )

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is None:
            value = default
        if value is None:
            raise CheckpointError(f"config.json has no {self._path}{key}.")
        return value
