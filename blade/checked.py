"""Checked access to what a model's files say of it: a wrong value is an error that names its key."""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, NoReturn, TypeGuard

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_INTEGER = 2**31 - 1
MAX_WIDTH = 2**20  # of all heads together: so few channels that a list of them costs nothing
MAX_EXPERTS = 2**14  # of a layer, likewise
MAX_LAYERS = 1024  # of a model: so few that lists of what each of them is cost nothing
# In which config.json has the text model of one that sees or hears as well, the second within the first or without it
TEXT_SECTIONS = ("thinker_config", "text_config")


class CheckedValues(ABC):
    """Values by key; an absent key without a default is an error. Every method raises CheckpointError."""

    __slots__ = ()

    def integer(self, key: str, default: int | None = None, minimum: int = 1, maximum: int = MAX_INTEGER) -> int:
        value = self._get(key, default)
        if type(value) is not int or not minimum <= value <= maximum:
            self.refuse(key, f"an integer from {minimum} to {maximum}")
        return value

    def number(self, key: str, default: float | None = None, minimum: float = 0.0, maximum: float = math.inf) -> float:
        """Finite and above 0; where bounds are given, from one to the other."""
        value = self._get(key, default)
        if not is_number(value) or value <= 0 or not minimum <= value <= maximum:
            bounded = f"a number from {minimum:g} to {maximum:.10g}"
            self.refuse(key, bounded if maximum < math.inf else "a positive number")
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


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether it is one that a finite float can be; integers of hundreds of digits cannot."""
    return isinstance(value, int | float) and type(value) is not bool and abs(value) <= sys.float_info.max


def text_section(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What config.json says of the text model; all of it where that has no section."""
    for key in TEXT_SECTIONS:
        section = config.get(key)
        config = section if isinstance(section, dict) else config
    return config
