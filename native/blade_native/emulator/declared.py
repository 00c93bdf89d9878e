"""What a source declares about its kernels: which instantiations ship, and what each may use.

    // check: decode<{__half, __nv_bfloat16}, {64, 128}> | threads 128 | registers 144 | shared 98304 | blocks 2
    // check: decode<__half, 256> | threads 128 | registers 255 | blocks 2 | blocks@86,89,120 1 | arch 80,86,89,90

stands above the kernel. Braces expand to all combinations. `shared` is a launch's dynamic shared memory in bytes,
`blocks` how many have to fit on one SM, `stack` the local memory it may use (none unless said), `arch` where the kernel
is used at all; a limit with @ holds on those architectures only. Spills are never allowed.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

CHECK = re.compile(r"^[ \t]*//[ \t]*check:[ \t]*(.+)$", re.MULTILINE)
LIMITS = ("threads", "registers", "shared", "blocks", "stack")


class DeclarationError(ValueError):
    """A `// check:` line that cannot be read."""


@dataclass(frozen=True)
class Limits:
    """`threads` of a block and its dynamic `shared` bytes; ceilings for `registers` and `stack` bytes of a thread; a
    floor for `blocks` on an SM."""

    threads: int
    registers: int = 255
    shared: int = 0
    blocks: int = 1
    stack: int = 0


@dataclass(frozen=True)
class Check:
    """One instantiation; `first` is the first of its line, which stands for the line in quick runs."""

    expression: str
    first: bool
    limits: Limits
    overrides: tuple[tuple[str, str, int], ...] = ()  # (arch, limit, value)
    archs: tuple[str, ...] = ()  # all where empty

    def on(self, arch: str) -> Limits | None:
        """The limits on an architecture ("sm_90"); None where the kernel is not used."""
        if self.archs and arch not in self.archs:
            return None
        return replace(self.limits, **{name: value for where, name, value in self.overrides if where == arch})


def checks(source: str) -> list[Check]:
    """All checks that a source declares, in order. Raises DeclarationError."""
    return [check for line in CHECK.findall(source) for check in _read(line)]


def _read(line: str) -> Iterator[Check]:
    pattern, *parts = (part.strip() for part in line.split("|"))
    values: dict[str, int] = {}
    overrides: list[tuple[str, str, int]] = []
    archs: tuple[str, ...] = ()
    for part in parts:
        match = re.fullmatch(r"(\w+)(?:@([\d,]+))?\s+([\d,]+)", part)
        if match is None or match[1] not in (*LIMITS, "arch"):
            raise DeclarationError(f"cannot read `{part}` in `// check: {line}`")
        if match[1] == "arch":
            archs = _archs(match[3])
        elif match[2]:
            overrides += [(arch, match[1], int(match[3])) for arch in _archs(match[2])]
        else:
            values[match[1]] = int(match[3])
    if "threads" not in values:
        raise DeclarationError(f"`// check: {line}` does not say how many threads a block has")
    for i, expression in enumerate(expand(pattern)):
        yield Check(expression, i == 0, Limits(**values), tuple(overrides), archs)


def _archs(numbers: str) -> tuple[str, ...]:
    return tuple(f"sm_{number}" for number in numbers.split(","))


def expand(pattern: str) -> list[str]:
    """ "f<{a, b}, {1, 2}>" -> ["f<a, 1>", "f<a, 2>", "f<b, 1>", "f<b, 2>"]."""
    pieces = re.split(r"\{([^{}]*)\}", pattern)
    choices = [[part.strip() for part in piece.split(",")] if i % 2 else [piece] for i, piece in enumerate(pieces)]
    return ["".join(choice) for choice in itertools.product(*choices)]
