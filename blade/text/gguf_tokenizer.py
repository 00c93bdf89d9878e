"""The tokenizer a GGUF file carries in its metadata, made to encode as the original does.

Two kinds are known: "gpt2", byte-level BPE with its merges (Qwen, Llama 3, SmolLM), and "llama", SentencePiece BPE
(Kudo and Richardson 2018) with a score per token instead of merges (Llama 1 and 2, Mistral).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import IntEnum
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from blade.errors import CheckpointError
from blade.text.post_processor import surround
from blade.text.pretokenizers import PRETOKENIZERS, Pretokenizer
from blade.text.token_bytes import byte_alphabet

_REMEDY = "Pass --tokenizer-dir with a folder that holds the model's own tokenizer.json."
MOST_CUTS = 1 << 27  # of all tokens, the squares of their lengths: so much is read to find every way to cut them in two
# Control tokens that end a turn or a text. A file names one or two of them; a model may sample any it has.
_END_TOKENS = frozenset(
    [
        *("<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "</s>"),
        *("<|end_of_turn|>", "<end_of_turn>", "<\uff5cend\u2581of\u2581sentence\uff5c>"),
    ]
)


class TokenType(IntEnum):
    """`tokenizer.ggml.token_type`, as gguf.TokenType has it."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class GGUFVocabulary:
    """The `tokenizer.ggml.*` part of a file's metadata; `path` is for messages."""

    def __init__(self, path: Path, metadata: Mapping[str, Any]) -> None:
        self.path = path
        self._metadata = metadata
        self.tokens: list[str] = self.array("tokens", str)

    @cached_property
    def special_types(self) -> dict[int, int]:
        """Id -> type of the few tokens that are not normal."""
        types = self.per_token("token_type", int) if self.get("token_type") else []
        if odd := next((kind for kind in types if not 0 <= kind <= max(TokenType)), None):
            raise self.error("token_type", f"has a token of the type {odd}")
        return {i: kind for i, kind in enumerate(types) if kind != 1}

    def get(self, name: str, default: Any = None) -> Any:
        return self._metadata.get(f"tokenizer.ggml.{name}", default)

    def flag(self, name: str, default: bool) -> bool:
        value = self.get(name, default)
        if type(value) is not bool:
            raise self.error(name, f"is {value!r:.60}, neither true nor false")
        return value

    def array(self, name: str, kind: type) -> list[Any]:
        """GGUF's arrays are of one kind, so the first item tells that of all."""
        value = self.get(name)
        if not isinstance(value, list) or (value and type(value[0]) is not kind):
            raise CheckpointError(f"{self.path} has no list tokenizer.ggml.{name} of {kind.__name__}.", _REMEDY)
        return value

    def per_token(self, name: str, kind: type) -> list[Any]:
        """An item for each token."""
        value = self.array(name, kind)
        if len(value) != len(self.tokens):
            raise self.error(name, f"has {len(value)} items, and tokenizer.ggml.tokens {len(self.tokens)}")
        return value

    def error(self, name: str, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: tokenizer.ggml.{name} {what}.", _REMEDY)

    def of_type(self, *kinds: TokenType) -> list[int]:
        return [i for i, kind in self.special_types.items() if kind in kinds]

    def vocab(self) -> dict[str, int]:
        """Text -> id, without the fillers at the end that only pad the embedding."""
        num_tokens = len(self.tokens)
        while num_tokens and self.special_types.get(num_tokens - 1) == TokenType.UNUSED:
            num_tokens -= 1
        vocab = dict(zip(self.tokens, range(num_tokens), strict=False))
        if len(vocab) < num_tokens:
            twice = next(i for i, token in enumerate(self.tokens) if vocab[token] != i)
            raise self.error(
                "tokens", f"has {self.tokens[twice]!r:.60} twice, as {twice} and {vocab[self.tokens[twice]]}"
            )
        return vocab

    def token(self, name: str) -> tuple[str, int] | None:
        """(text, id) of the token that tokenizer.ggml.<name>_token_id names."""
        token_id = self.get(f"{name}_token_id")
        if token_id is None:
            return None
        if type(token_id) is not int or not 0 <= token_id < len(self.tokens):
            raise CheckpointError(
                f"{self.path}: tokenizer.ggml.{name}_token_id {token_id!r:.60} is not in the vocabulary.", _REMEDY
            )
        return self.tokens[token_id], token_id

    def special_tokens(self) -> dict[str, str]:
        """The names chat templates know: bos_token, eos_token, ..."""
        names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
        found = {name: self.token(theirs) for name, theirs in names.items()}
        return {f"{name}_token": token[0] for name, token in found.items() if token}

    def eos_token_ids(self) -> tuple[int, ...]:
        named = [token[1] for name in ("eos", "eot", "eom") if (token := self.token(name))]
        known = [i for i in self.of_type(TokenType.CONTROL) if self.tokens[i] in _END_TOKENS]
        return tuple(dict.fromkeys(named + known))


def build_gguf_tokenizer(vocabulary: GGUFVocabulary) -> Tokenizer:
    """Raises CheckpointError for a kind, a pre-tokenizer or a content that blade does not know."""
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    kind = vocabulary.get("model")
    if not isinstance(kind, str) or kind not in builders:
        raise CheckpointError(f"{vocabulary.path}: tokenizer.ggml.model {kind!r} is not supported.", _REMEDY)
    try:
        tokenizer, add_bos = builders[kind](vocabulary)
    except CheckpointError:
        raise
    except Exception as error:  # the tokenizers library raises nothing more precise
        raise CheckpointError(f"{vocabulary.path}: the tokenizer.ggml metadata is malformed.", _REMEDY) from error
    _add_tokens(tokenizer, vocabulary)
    _add_post_processor(tokenizer, vocabulary, add_bos)
    return tokenizer


def _byte_level(vocabulary: GGUFVocabulary) -> tuple[Tokenizer, bool]:
    """(tokenizer, whether such models begin with BOS unless told)."""
    pre = _pretokenizer(vocabulary)
    vocab, merges = vocabulary.vocab(), [tuple(merge.split(" ")) for merge in vocabulary.array("merges", str)]
    if lacking := next(
        (char for char, byte in byte_alphabet().items() if 32 <= byte < 127 and char not in vocab), None
    ):
        raise vocabulary.error("tokens", f"lacks {lacking!r}, so that texts with it would be encoded without it")
    for merge in merges:
        if len(merge) != 2 or not {*merge, "".join(merge)} <= vocab.keys():
            raise vocabulary.error("merges", f"has {' '.join(merge)!r:.60}, which joins no two tokens to a third")
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre.ignore_merges))
    if pre.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre.build()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, pre.add_bos


def _pretokenizer(vocabulary: GGUFVocabulary) -> Pretokenizer:
    name = vocabulary.get("pre", "default")
    if not isinstance(name, str) or name not in PRETOKENIZERS:
        raise CheckpointError(f"{vocabulary.path}: tokenizer.ggml.pre {name!r} is not supported.", _REMEDY)
    return PRETOKENIZERS[name]


def _sentencepiece(vocabulary: GGUFVocabulary) -> tuple[Tokenizer, bool]:
    unknown = vocabulary.token("unknown") or ("<unk>", 0)
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary.vocab(),
            merges=score_merges(vocabulary),
            unk_token=unknown[0],
            fuse_unk=True,
            byte_fallback=bool(vocabulary.of_type(TokenType.BYTE)),
        )
    )
    prefix = vocabulary.flag("add_space_prefix", True)
    # A space goes before the text and, as in llama.cpp, before what follows a control token.
    spaces = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*spaces, normalizers.Replace(" ", "▁")])
    unprefix = [decoders.Strip(" ", 1, 0)] if prefix else []
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *unprefix]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer, True


def score_merges(vocabulary: GGUFVocabulary) -> list[tuple[str, str]]:
    """The merges that do what SentencePiece does with scores: of all adjacent pairs that spell a token, join the one
    with the highest score. Between two spellings of one token the longer left part goes first, as in transformers."""
    scores = vocabulary.per_token("scores", float)
    if not all(map(math.isfinite, scores)):
        raise vocabulary.error("scores", "has one that is no finite number")
    mergeable = {
        token: score
        for i, (token, score) in enumerate(zip(vocabulary.tokens, scores, strict=True))
        if vocabulary.special_types.get(i) in (None, TokenType.USER_DEFINED)
    }
    if sum(len(token) ** 2 for token in mergeable) > MOST_CUTS:
        raise vocabulary.error(
            "tokens", f"has tokens of up to {max(map(len, mergeable))} characters, which are too long"
        )
    merges = [
        (-score, -cut, -len(token), token)
        for token, score in mergeable.items()
        for cut in range(1, len(token))
        if token[:cut] in mergeable and token[cut:] in mergeable
    ]
    merges.sort()
    return [(token[:-cut], token[-cut:]) for _, cut, _, token in merges]


def _add_tokens(tokenizer: Tokenizer, vocabulary: GGUFVocabulary) -> None:
    """Control tokens and user-defined ones are matched in the raw text, before everything else."""
    special = dict.fromkeys(vocabulary.of_type(TokenType.CONTROL, TokenType.UNKNOWN), True)
    added = special | dict.fromkeys(vocabulary.of_type(TokenType.USER_DEFINED), False)
    tokenizer.add_tokens([AddedToken(vocabulary.tokens[i], special=added[i], normalized=False) for i in sorted(added)])


def _add_post_processor(tokenizer: Tokenizer, vocabulary: GGUFVocabulary, add_bos: bool) -> None:
    bos = vocabulary.token("bos") if vocabulary.flag("add_bos_token", add_bos) else None
    eos = vocabulary.token("eos") if vocabulary.flag("add_eos_token", False) else None
    surround(tokenizer, bos and bos[0], eos and eos[0])
