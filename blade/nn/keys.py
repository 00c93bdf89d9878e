"""Checked access to config.json: a wrong value is reported by its key, not met later as an exception of torch's."""

from __future__ import annotations

import reprlib
from typing import TYPE_CHECKING, Any, NoReturn

from blade.checked import CheckedValues
from blade.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping


class Keys(CheckedValues):
    """A JSON object's values by key. null counts as absent; an absent key without a default is an error.

    Every method raises CheckpointError, which names the key.
    """

    def __init__(self, values: Mapping[str, Any], path: str = "") -> None:
        self._values = values
        self._path = path

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

    def section(self, key: str) -> Keys:
        """The object under `key`, empty when absent."""
        value = self._get(key, {})
        if type(value) is not dict:
            self.refuse(key, "an object")
        return Keys(value, f"{self._path}{key}.")

    def with_default(self, key: str, value: Any) -> Keys:
        """The same, with a value for the key where it has none."""
        return self if self.has(key) else Keys({**self._values, key: value}, self._path)

    def has(self, key: str) -> bool:
        return self._values.get(key) is not None

    def refuse(self, key: str, wanted: str) -> NoReturn:
        raise CheckpointError(
            f"config.json: {self._path}{key} must be {wanted}, not {reprlib.repr(self._values.get(key))}."
        )

    def _get(self, key: str, default: Any) -> Any:
        value = self._values.get(key)
        if value is None:
            value = default
        if value is None:
            raise CheckpointError(f"config.json has no {self._path}{key}.")
        return value
