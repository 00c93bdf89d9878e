"""Whether a tokenizer.json has parts alone that take time and memory in proportion to a text.

The tokenizers library runs whatever regular expressions a file has, by backtracking: the time of some grows with the
cube of a text, or until the library panics. Replacements may make a text any number of times as long. What is not known
to be harmless is not refused: it is run where it can be stopped (blade.text.tokenizer_process).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from blade.text.pretokenizers import KNOWN_PATTERNS

MOST_GROWTH = 16  # by how much replacements may make a text longer
MOST_STEPS = 16  # of a sequence; ids and pieces around a text
LONGEST_TOKEN = 1024  # of a unigram model, which tries all of them at each character
_NORMALIZERS = {"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Strip", "StripAccents", "BertNormalizer"}
_PRE_TOKENIZERS = {
    *("ByteLevel", "Whitespace", "WhitespaceSplit", "Metaspace", "Digits", "Punctuation", "BertPreTokenizer"),
    *("UnicodeScripts", "CharDelimiterSplit"),
}
_POST_PROCESSORS = {"ByteLevel", "BertProcessing", "RobertaProcessing"}
_CLASS = re.compile(r"(\\[sSdDwW]|\\[pP]\{\w+\}|\[(?:[^\[\]\\]|\\.)+\])([+*?]|\{\d(,\d?)?\})?")  # alone: one pass

Part = Mapping[str, Any] | None


def is_usual(state: Mapping[str, Any]) -> bool:
    """`state`: the file's content, which the library can read."""
    normalizers, pre_tokenizers = (
        _steps(state.get("normalizer"), "normalizers"),
        _steps(state.get("pre_tokenizer"), "pretokenizers"),
    )
    growth = 1.0
    for step in normalizers:
        growth *= _growth(step)
    return (
        len(normalizers) <= MOST_STEPS
        and growth <= MOST_GROWTH
        and len(pre_tokenizers) <= MOST_STEPS
        and all(map(_cuts_in_one_pass, pre_tokenizers))
        and all(map(_adds_little, _steps(state.get("post_processor"), "processors")))
        and not any(token["lstrip"] and not token["special"] for token in state.get("added_tokens") or ())
        and _is_quick(state["model"])
    )


def _steps(part: Part, key: str) -> list[Mapping[str, Any]]:
    if part is None:
        return []
    return [each for step in part[key] for each in _steps(step, key)] if part["type"] == "Sequence" else [part]


def _growth(step: Mapping[str, Any]) -> float:
    """By how much it makes a long text longer at most."""
    match step:
        case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)} if old:
            return max(1.0, len(new.encode()) / len(old.encode()))
        case {"type": "Prepend", "prepend": str(text)}:
            return 1.0 if len(text) <= MOST_STEPS else float("inf")
    return 1.0 if step["type"] in _NORMALIZERS else float("inf")


def _cuts_in_one_pass(step: Mapping[str, Any]) -> bool:
    match step:
        case {"type": "Split", "pattern": {"String": str(text)}}:
            return bool(text)
        case {"type": "Split", "pattern": {"Regex": str(pattern)}}:
            return pattern in KNOWN_PATTERNS or _CLASS.fullmatch(pattern) is not None
    return step["type"] in _PRE_TOKENIZERS


def _adds_little(step: Mapping[str, Any]) -> bool:
    if step["type"] != "TemplateProcessing":
        return step["type"] in _POST_PROCESSORS
    ids = [i for token in step["special_tokens"].values() for i in token["ids"]]
    texts = [piece for piece in step["single"] if "Sequence" in piece]
    return len(texts) <= 1 and max(len(step["single"]), len(ids)) <= MOST_STEPS


def _is_quick(model: Mapping[str, Any]) -> bool:
    if model.get("type") == "Unigram":
        return max((len(token) for token, _ in model["vocab"]), default=0) <= LONGEST_TOKEN
    return model.get("type", "BPE") in ("BPE", "WordPiece", "WordLevel")
