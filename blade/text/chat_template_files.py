"""Where a model keeps its chat template."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blade.errors import CheckpointError
from blade.files import is_file
from blade.text import qwen_tiktoken
from blade.text.tokenizer_files import read_json

Sources = tuple[str | None, str | None, str]
"""(the template, the one for tools where that is another, where they were found)"""


def override_source(path: Path) -> Sources:
    return _read(path), None, str(path)


def gguf_sources(path: Path, metadata: Mapping[str, Any]) -> Sources:
    key = "tokenizer.chat_template"
    return metadata.get(key), metadata.get(f"{key}.tool_use"), f"{path}: {key}"


def folder_sources(folder: Path) -> Sources:
    """transformers' order: a file of its own, then `chat_template` in a JSON file, a string or a list of named ones.
    The first Qwen's folders have code instead, and say in generation_config.json what it does."""
    path = folder / "chat_template.jinja"
    if is_file(path):
        return _read(path), None, str(path)
    for name in ("chat_template.json", "tokenizer_config.json"):
        found = read_json(folder / name).get("chat_template")
        if found is not None:
            return *_named(found, folder / name), str(folder / name)
    if is_file(folder / qwen_tiktoken.NAME):
        path = folder / "generation_config.json"
        return qwen_tiktoken.CHAT_TEMPLATES.get(str(read_json(path).get("chat_format"))), None, str(path)
    return None, None, str(folder)


def _named(found: Any, path: Path) -> tuple[str | None, str | None]:
    if isinstance(found, str):
        return found, None
    try:
        named = {entry["name"]: entry["template"] for entry in found}
    except (TypeError, KeyError):
        raise CheckpointError(f"{path}: chat_template is neither a string nor a list of named templates.") from None
    return named.get("default"), named.get("tool_use")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"The chat template {path} cannot be read as UTF-8 text.") from error
