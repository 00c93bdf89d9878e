"""Checked access to what a model's files say of it: a wrong value is an error that names its key."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, NoReturn

MAX_INTEGER = 2**31 - 1
MAX_LAYERS = 1024  # of a model: so few that lists of what each of them is cost nothing


class CheckedValues(ABC):
    """Values by key; an absent key without a default is an error. Every method raises CheckpointError."""

    __slots__ = ()

    def integer(self, key: str, default: int | None = None, minimum: int = 1, maximum: int = MAX_INTEGER) -> int:
        value = self._get(key, default)
        if type(value) is not int or not minimum <= value <= maximum:
            self.refuse(key, f"an integer from {minimum} to {maximum}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Finite and above 0."""
        value = self._get(key, default)
        if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:
            self.refuse(key, "a positive number")
        return float(value)

    def text(self, key: str, default: str | None = None) -> str:
        value = self._get(key, default)
        if type(value) is not str:
            self.refuse(key, "a string")
        return value

    @abstractmethod
    def has(self, key: str) -> bool: ...

    @abstractmethod
    def refuse(self, key: str, wanted: str) -> NoReturn:
        """Raise the error of a key whose value is not what was wanted."""

    @abstractmethod
    def _get(self, key: str, default: Any) -> Any:
        """The value, or the default where it is absent; raises when there is neither."""
