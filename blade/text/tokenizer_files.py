"""The tokenizer files of a model folder. No code of the folder runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
from tokenizers import Tokenizer

from blade.errors import CheckpointError
from blade.files import is_file, read_file
from blade.text import qwen_tiktoken
from blade.text.post_processor import surround
from blade.text.usual_tokenizers import is_usual

_REMEDY = "Pass --tokenizer-dir with a folder that holds the model's tokenizer.json."


Parts = dict[str, Any]
"""Of a tokenizer.json: its normalizer and pre_tokenizer."""


def read_folder(folder: Path) -> tuple[Tokenizer, tuple[int, ...], str | None, Parts | None]:
    """(tokenizer, end-of-sequence ids, BOS, None) of a folder in Hugging Face's layout. Where the tokenizer is unusual
    (blade.text.usual_tokenizers) it is without the parts that come last."""
    tokenizer, unusual = _read_tokenizer(folder)
    special_tokens = read_special_tokens(folder)
    bos, eos = special_tokens.get("bos_token"), special_tokens.get("eos_token")
    config = read_json(folder / "tokenizer_config.json")
    add_bos, add_eos = config.get("add_bos_token"), config.get("add_eos_token")
    if add_bos is not None or add_eos is not None:  # that outweighs tokenizer.json, as in transformers
        surround(tokenizer, bos if add_bos else None, eos if add_eos else None)
    return tokenizer, _eos_token_ids(folder, tokenizer, eos), bos, unusual


def tokenizer_names(folder: Path) -> tuple[str, ...]:
    """The files of a folder that `read_folder` reads the vocabulary from; none of them: ()."""
    kinds = ("tokenizer.json",), ("vocab.json", "merges.txt"), (qwen_tiktoken.NAME,), ("tokenizer.model",)
    return next((names for names in kinds if all(is_file(folder / name) for name in names)), ())


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} when there is no such file."""
    if not is_file(path):
        return {}
    try:
        return msgspec.json.decode(read_file(path), type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a JSON object.") from error


def _read_tokenizer(folder: Path) -> tuple[Tokenizer, Parts | None]:
    path, names = folder / "tokenizer.json", tokenizer_names(folder)
    if path.name not in names:
        return _convert(folder, names), None
    state, parts = read_json(path), None
    try:
        if not is_usual(state):
            parts = {name: state.pop(name, None) for name in ("normalizer", "pre_tokenizer")}
        return Tokenizer.from_str(msgspec.json.encode(state).decode()), parts
    except Exception as error:  # the library raises nothing more precise
        raise CheckpointError(f"{path} is no tokenizer that the installed tokenizers library can read.") from error


def _convert(folder: Path, names: tuple[str, ...]) -> Tokenizer:
    """From older files, by transformers' own classes; importing them takes seconds."""
    remedy = _REMEDY
    if "vocab.json" in names:
        name = "Qwen2Tokenizer"
    elif qwen_tiktoken.NAME in names:
        return qwen_tiktoken.read_qwen_tiktoken(folder / qwen_tiktoken.NAME)
    elif "tokenizer.model" in names:
        name = "LlamaTokenizer"
        remedy = f"Install the packages sentencepiece and protobuf if they are missing. Else: {_REMEDY}"
    else:
        raise CheckpointError(
            f"{folder} holds no tokenizer.json, vocab.json with merges.txt, tokenizer.model or qwen.tiktoken.", _REMEDY
        )
    import transformers

    try:
        converted = getattr(transformers, name).from_pretrained(folder, local_files_only=True).backend_tokenizer
    except Exception as error:  # of any kind: a missing package, a malformed file
        raise CheckpointError(f"{folder}: transformers' {name} cannot read the tokenizer files.", remedy) from error
    if not isinstance(converted, Tokenizer):
        raise CheckpointError(f"{folder}: transformers' {name} gives no fast tokenizer.", _REMEDY)
    return converted


def read_special_tokens(folder: Path) -> dict[str, str]:
    """{"bos_token": "<s>", ...}; in the files a value is a string or an object with `content`."""
    merged = read_json(folder / "special_tokens_map.json") | read_json(folder / "tokenizer_config.json")
    named = {name: value for name, value in merged.items() if name.endswith("_token")}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in named.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _eos_token_ids(folder: Path, tokenizer: Tokenizer, eos: str | None) -> tuple[int, ...]:
    """Those generation_config.json lists and the tokenizer's own; config.json's where neither names one."""
    named = [eos] if eos is not None else qwen_tiktoken.END_TOKENS if is_file(folder / qwen_tiktoken.NAME) else []
    own = [token_id for token in named if (token_id := tokenizer.token_to_id(token)) is not None]
    ids = _read_ids(folder / "generation_config.json") + own
    return tuple(dict.fromkeys(ids or _read_ids(folder / "config.json")))


def _read_ids(path: Path) -> list[int]:
    value = read_json(path).get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int and 0 <= i < 1 << 31 for i in ids):
        raise CheckpointError(f"{path}: eos_token_id is neither an id nor a list of ids.")
    return ids
