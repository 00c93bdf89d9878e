"""What Python has to know of a CUDA source: its text with headers inlined, and what its kernels take.

A kernel takes one argument, a struct by value, so that a launch packs one buffer and cannot get the order wrong:

    template <class T> struct AddArgs { T* out; const T* x; float scale; int num_rows; };
    template <class T, int WIDTH> __global__ void __launch_bounds__(128) add(const AddArgs<T> args) { ... }
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]+"([^"]+)"[^\n]*$', re.MULTILINE)
COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
STRUCT = re.compile(
    r"\bstruct\s+(?:__align__\s*\(\s*\d+\s*\)\s*)?(\w+)\s*(?::\s*(\w+)\s*(?:<[^<>]*>)?\s*)?\{([^{}]*)\}\s*;"
)
PARENTHESES = r"\((?:[^()]|\([^()]*\))*\)"
KERNEL = re.compile(
    r"(?:template\s*<(?P<template>[^<>]*)>\s*)?(?:extern\s*\"C\"\s*)?__global__\s+void\s+"
    rf"(?:__launch_bounds__\s*{PARENTHESES}\s*)?(?P<name>\w+)\s*\((?P<parameters>{PARENTHESES[2:-2]})\)"
)
PARAMETER = re.compile(r"\s*(?:(?:const|__grid_constant__)\s+)*(\w+)\s*(?:<[^<>]*>)?\s*(?:const\s+)?\w+\s*")
TYPE = r"(?:(?:un)?signed\b(?:\s+(?:int|char|short|long\s+long)\b)?|long\s+long\b|\w+(?:\s*<[^<>]*>)?)"
MEMBER = re.compile(rf"(?:const\s+)?({TYPE})\s*(\**)\s*(.*)", re.DOTALL)
DECLARATOR = re.compile(r"(\**)\s*(?:__restrict__\s+)?(\w+)")
SCALARS = {
    "int": "i4", "unsigned": "u4", "unsigned int": "u4", "long long": "i8", "unsigned long long": "u8",
    "float": "f4", "double": "f8", "bool": "?", "signed char": "i1", "unsigned char": "u1",
}  # fmt: skip


class SourceError(ValueError):
    """A CUDA source cannot be launched: the text names the file's construct."""


@dataclass(frozen=True)
class Field:
    """One member of an argument struct; `element` is the C++ type a pointer points to, None for a scalar."""

    name: str
    dtype: str
    element: str | None


@dataclass(frozen=True)
class Signature:
    """`parameters`: names of the template parameters; `fields`: members of the argument struct, in order."""

    name: str
    parameters: tuple[str, ...]
    fields: tuple[Field, ...]

    def layout(self) -> np.dtype[np.void]:
        """The struct as the C++ compiler lays it out."""
        return np.dtype([(field.name, field.dtype) for field in self.fields], align=True)


def inline(path: Path) -> str:
    """The source with the headers it includes by "name" put in place, each once: CuPy's compile cache hashes the
    source alone and would not notice that a header has changed."""
    return "\n".join(_inlined(path, set()))


def _inlined(path: Path, done: set[Path]) -> Iterator[str]:
    text, line, end = path.read_text(encoding="utf-8").replace("#pragma once\n", "\n"), 1, 0
    yield f'#line 1 "{path.name}"'
    for include in INCLUDE.finditer(text):
        yield text[end : include.start()]
        header, end = path.parent / include[1], include.end()
        if not header.exists():  # a plugin's source includes "portable.cuh"
            header = Path(__file__).parent / include[1]
        if header not in done:
            done.add(header)
            yield from _inlined(header, done)
        line = text.count("\n", 0, end) + 1
        yield f'#line {line} "{path.name}"'
    yield text[end:]


def kernels(source: str) -> dict[str, Signature]:
    """The kernels of a source by name. Raises SourceError for one whose arguments are not a struct of plain members."""
    text = COMMENT.sub(" ", source)
    structs = {name: (base, body) for name, base, body in STRUCT.findall(text)}
    found = {}
    for match in KERNEL.finditer(text):
        parameter = PARAMETER.fullmatch(match["parameters"])
        if parameter is None or parameter[1] not in structs:
            raise SourceError(f"kernel {match['name']} has to take one struct by value, defined in the same source")
        names = tuple(part.split("=")[0].split()[-1] for part in (match["template"] or "").split(",") if part.strip())
        found[match["name"]] = Signature(match["name"], names, tuple(_fields(parameter[1], structs)))
    return found


def _fields(struct: str, structs: Mapping[str, tuple[str, str]]) -> Iterator[Field]:
    base, body = structs[struct]
    if base:
        if base not in structs:
            raise SourceError(f"struct {struct}: its base {base} is not defined in the same source")
        inherited = list(_fields(base, structs))
        _refuse_padding(struct, base, inherited)
        yield from inherited
    for statement in filter(None, (part.strip() for part in body.split(";"))):
        member = MEMBER.fullmatch(statement)
        if member is None:
            raise SourceError(f"struct {struct}: cannot read `{statement}`")
        base, stars = " ".join(member[1].split()), member[2]
        for declarator in member[3].split(","):
            match = DECLARATOR.fullmatch(declarator.strip())
            if match is None:
                raise SourceError(f"struct {struct}: cannot read `{statement}`")
            if stars or match[1]:
                yield Field(match[2], "u8", base)
            elif base in SCALARS:
                yield Field(match[2], SCALARS[base], None)
            else:
                raise SourceError(f"struct {struct}: {match[2]} is a {base}, not one of {', '.join(SCALARS)}")
            stars = "" if match[1] else stars


def _refuse_padding(struct: str, base: str, fields: Sequence[Field]) -> None:
    """Compilers differ in whether members of a struct go where its base has padding at its end."""
    layout = np.dtype([(field.name, field.dtype) for field in fields], align=True)
    last = layout.fields[fields[-1].name] if fields and layout.fields else None
    if last is None or last[1] + last[0].itemsize != layout.itemsize:
        raise SourceError(f"struct {struct}: its base {base} is empty or ends in padding")


def template_arguments(expression: str) -> tuple[str, Sequence[str]]:
    """ "decode<__half, 128>" -> ("decode", ["__half", "128"])."""
    name, _, rest = expression.partition("<")
    return name.strip(), [part.strip() for part in rest.rpartition(">")[0].split(",") if part.strip()]
