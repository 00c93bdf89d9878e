"""JSON files of a checkpoint, which come from anywhere."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from blade.errors import CheckpointError
from blade.files import read_file

if TYPE_CHECKING:
    from pathlib import Path

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; CheckpointError where there is none."""
    return parse_json(path, read_file(path))


def parse_json(path: Path, data: bytes) -> dict[str, Any]:
    """The object in `data`, which is from the file at `path`; its keys must be unique."""
    try:
        value = json.loads(text := data.decode("utf-8-sig"), object_pairs_hook=_unique)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()  # a half alone is no text that others would take
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not sound JSON: {error}.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object.")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} comes twice")
    return values
