"""How large the texts and lists would be that a chat template is about to make: TooMuch is raised beforehand."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from string import Formatter
from typing import Any

from jinja2 import TemplateError

MOST = 1 << 24  # characters of a text, or items of a list and of those within it
MOST_BITS = 1 << 12  # of an integer
MOST_SLOW = 1 << 20  # of what is given to a filter that takes long for each item, or longer the more of them there are
SLOW = {"wordwrap", "urlize", "sort", "dictsort", "unique", "groupby"}
_WIDE = re.compile(r"%[^a-zA-Z%]*(\*|\d{5})")  # in a format of the operator %
_GROWING = {"center", "ljust", "rjust", "zfill", "expandtabs", "translate", "indent", "wordwrap", "batch", "slice"}
_OF_ITEMS = {
    *("list", "length", "count", "first", "last", "map", "select", "selectattr", "reject", "rejectattr", "groupby"),
    *("sort", "unique", "batch", "slice", "items", "dictsort", "default", "d", "sum", "min", "max", "random"),
    *("reverse", "attr"),
}  # filters that make no text of what they are given
_ITEM, _VALUE = 8, 64  # as many characters' memory, and time


class TooMuch(TemplateError):
    """The template takes more time or memory than a conversation is worth."""


def check(number: float, most: int = MOST) -> None:
    if number > most:
        raise TooMuch


def size(value: Any) -> int:
    """In characters; of others than texts and containers 0."""
    if isinstance(value, str):
        return len(value)
    return _ITEM * len(value) if isinstance(value, list | tuple | dict) else 0


def check_binop(operator: str, left: Any, right: Any) -> None:
    if operator == "+":
        check(size(left) + size(right))
    elif operator == "%" and isinstance(left, str):
        _check_widths(left)
        printable(right)
    elif isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
        check(bits, MOST_BITS)
    elif operator == "*":
        check(_product(left, right))


def check_method(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Of a text, where it makes a larger one."""
    function = getattr(function, "__wrapped__", function)  # of a format that the sandbox watches
    text, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
    if isinstance(text, str):
        _check_call(name, text, (*args, *kwargs.values()))


def check_filter(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    if name in SLOW:
        check(size(args[0]), MOST_SLOW)
    if name not in _OF_ITEMS:
        for each in (*args, *kwargs.values()):
            printable(each)
    if name == "format":
        _check_widths(str(args[0]))
    elif name == "tojson":
        check(_product(kwargs.get("indent"), *args[1:]))
    elif name == "join":
        if args[1:]:
            check(size(args[0]) * max(size(args[1]), 1))
    elif name == "sum":
        start = kwargs.get("start", args[2] if len(args) > 2 else 0)
        check(0 if isinstance(start, int | float) else math.inf)  # lists of lists become one of any length
    else:
        _check_call(name, args[0], (*args[1:], *kwargs.values()))


def printable(value: Any) -> Any:
    """The value, whose text is not too long: lists may hold others many times."""
    if isinstance(value, list | tuple | dict):
        _left(value, MOST)
    return value


def _check_call(name: str, value: Any, args: tuple[Any, ...]) -> None:
    if name in _GROWING:
        check(_product(value, *args))
    elif name == "replace" and len(args) > 1:
        old, new = map(str, args[:2])
        check(str(value).count(old) * len(new))
    elif name == "join" and args:
        printable(args[0])
        check(size(args[0]) * max(len(value), 1))
    elif name in ("format", "format_map"):
        for each in args:
            printable(each)
        check(max((_width(spec) for _, _, spec, _ in Formatter().parse(value)), default=0))


def _width(spec: str | None) -> float:
    """How wide it may make a value: known for short ones that hold no others."""
    return 0 if not spec or (len(spec) <= 8 and "{" not in spec) else math.inf


def _check_widths(text: str) -> None:
    check(math.inf if _WIDE.search(text) else 0)


def _product(*values: Any) -> int:
    """What they make at most, each multiplied by all others: numbers and sizes."""
    return math.prod(max(abs(value) if isinstance(value, int) else size(value), 1) for value in values)


def _left(value: Any, left: int) -> int:
    """Of so many characters and items, once the value's are taken away."""
    left -= size(value) + _VALUE
    check(-left, 0)
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, list | tuple):
        for each in value:
            left = _left(each, left)
    return left
