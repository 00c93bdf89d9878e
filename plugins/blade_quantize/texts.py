"""Texts that activations are made of: the user's, or blade's own."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from blade import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from collections.abc import Sequence as Seq

    from blade import ModelConfig
    from blade.contracts import OpenedModel, Tokenizer

OWN = Path(__file__).with_name("calibration.jsonl")
HELD_OUT = Path(__file__).with_name("held_out.txt")
SHORTEST = 8  # tokens of a sample: fewer say little of how a model is used
HELD_OUT_TOKENS = 1024
REMEDY = 'Name a file with one JSON object to a line: {"text": "..."}'


@dataclass(frozen=True, slots=True)
class Samples:
    """Token ids, and where they come from in words."""

    ids: list[list[int]]
    source: str

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.ids))

    def __str__(self) -> str:
        return f"{self.num_tokens} tokens of {self.source}, in {len(self.ids)} samples"


def read_samples(
    tokenizer: Tokenizer, calibration: Path | None, text: Seq[str], num_samples: int, num_tokens: int
) -> Samples:
    """At most `num_samples` pieces of at most `num_tokens` tokens: of every text the first, then of every text the
    second, and so on. Raises ConfigError where the texts are none."""
    texts = [*text, *(read_jsonl(calibration, "--calibration ") if calibration else ())]
    source = str(calibration) if calibration else "--text"
    if not texts:
        texts, source = read_jsonl(OWN), "blade's own texts"
    pieces = [
        (i, ids[i : i + num_tokens])
        for ids in map(tokenizer.encode, texts)
        for i in range(0, len(ids), num_tokens)
        if i == 0 or len(ids) - i >= SHORTEST
    ]
    found = [ids for _, ids in sorted(pieces, key=lambda piece: piece[0]) if ids][:num_samples]
    if not found:
        raise ConfigError(f"There is no text in {source}.")
    return Samples(found, source)


def read_jsonl(path: Path, option: str = "") -> list[str]:
    """The "text" of every line. Raises ConfigError naming the line that has none, after the `option` that named the
    file."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"{option}{path} cannot be read: {reason}.", REMEDY) from None
    texts = list(_texts(f"{option}{path}", lines))
    if not texts:
        raise ConfigError(f"{option}{path} holds no texts.", REMEDY)
    return texts


def _texts(source: str, lines: list[str]) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            json.dumps(entry, ensure_ascii=False).encode()  # half a surrogate pair is no text
        except (ValueError, RecursionError):
            entry = None
        if not isinstance(entry, dict) or not isinstance(entry.get("text"), str):
            raise ConfigError(
                f"{source}, line {number} is no JSON object with a text.", 'Every line has to be {"text": "..."}'
            )
        yield entry["text"]


def most_tokens(config: ModelConfig) -> int:
    """Of a sequence: the attention that they go through knows no dual chunks."""
    dual = config.dual_chunks
    return config.max_context if dual is None else min(config.max_context, dual.num_undivided)


def held_out_ids(opened: OpenedModel, evaluate: Path | None) -> list[int]:
    """The tokens that the result is measured on. Raises ConfigError for a file that is no text."""
    path = evaluate or HELD_OUT
    try:
        ids = opened.tokenizer.encode(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"--evaluate {path} cannot be read: {reason}.", "Name a text file.") from None
    ids = ids[: min(HELD_OUT_TOKENS, most_tokens(opened.model_config))]
    if len(ids) < 2:
        raise ConfigError(f"--evaluate {path} is too short to measure anything on.", "Take a longer text.")
    return ids
