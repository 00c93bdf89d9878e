"""Text to token ids and back, over the `tokenizers` library."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Encoding, Tokenizer

from blade.errors import CheckpointError, RequestError
from blade.text.token_bytes import TokenBytes
from blade.text.unused import unused_chars

REMEDY = "Fetch the model's tokenizer anew, or pass --tokenizer-dir with a folder that holds a sound one."
MOST_CONTROL = 1024  # characters of a control token: all its parts are looked for in what requests say


def load_tokenizer(path: Path, gguf_metadata: Mapping[str, Any] | None = None) -> HFTokenizer:
    """The tokenizer of a folder, or of the GGUF file whose metadata is given. Raises CheckpointError."""
    if gguf_metadata is None:
        from blade.text.tokenizer_files import read_folder

        tokenizer, eos_token_ids, bos, unusual = read_folder(path)
        if unusual is None:
            return HFTokenizer(tokenizer, eos_token_ids, bos)
        from blade.text.tokenizer_process import ProcessTokenizer

        return ProcessTokenizer(tokenizer, eos_token_ids, bos, unusual)
    from blade.text.gguf_tokenizer import GGUFVocabulary, build_gguf_tokenizer

    vocabulary = GGUFVocabulary(path, gguf_metadata)
    bos = vocabulary.special_tokens().get("bos_token")
    return HFTokenizer(build_gguf_tokenizer(vocabulary), vocabulary.eos_token_ids(), bos)


class HFTokenizer:
    """contracts.Tokenizer. Threads may share it: after construction nothing changes but a cache."""

    def __init__(self, tokenizer: Tokenizer, eos_token_ids: Seq[int], bos_token: str | None = None) -> None:
        """BOS and EOS are control tokens even where the files forgot to say so. Raises CheckpointError for one that is
        too long, and for a tokenizer that no text gets through."""
        tokenizer.no_truncation()
        tokenizer.no_padding()
        _mark_special(tokenizer, [bos_token, *map(tokenizer.id_to_token, eos_token_ids)])
        added = tokenizer.get_added_tokens_decoder()
        self.eos_token_ids = tuple(eos_token_ids)
        self.vocab_size = max(tokenizer.get_vocab_size(), max(added, default=-1) + 1)
        self.control_tokens: Mapping[str, int] = {token.content: i for i, token in added.items() if token.special}
        if (longest := max(map(len, self.control_tokens), default=0)) > MOST_CONTROL:
            raise CheckpointError(
                f"The tokenizer has a control token of {longest} characters, and blade takes {MOST_CONTROL} at most.",
                REMEDY,
            )
        self._control_bytes = {i: text.encode() for text, i in self.control_tokens.items()}
        self._token_bytes = TokenBytes(tokenizer)
        self._with_control = tokenizer
        self._plain = _twin(tokenizer)
        _check_sound(self._with_control, self._plain)

    def difference(self, other: HFTokenizer) -> str | None:
        """The first id that stands for one thing here and for another there, in words; None where all that both have
        are alike."""
        there = {i: token for token, i in other._with_control.get_vocab().items()}
        here = sorted((i, token) for token, i in self._with_control.get_vocab().items())
        return next((f"{i} is {token!r} and {there[i]!r}" for i, token in here if there.get(i, token) != token), None)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text. With add_special_tokens the tokenizer's own BOS or EOS is added as its files say; the text
        itself never yields a control token. Raises RequestError for half a surrogate pair."""
        return _encode(self._plain, text, add_special_tokens).ids

    def encode_template(self, text: str, literals: Mapping[str, str] | None = None) -> list[int]:
        """Ids of a rendered chat template, in which control tokens count and nothing is added.

        `literals` maps stand-in characters of the text to what they stand for: text that has no control tokens,
        whatever it looks like. What surrounds it is tokenised as if it had been there all along.
        """
        encoding = _encode(self._with_control, text)
        return self._encode_literals(text, encoding, literals) if literals else encoding.ids

    def _encode_literals(self, text: str, encoding: Encoding, literals: Mapping[str, str]) -> list[int]:
        """The control tokens found make way for a mark that is no control token; so the whole can be encoded without
        control tokens once the literals are in, and still be cut at the same places."""
        mark = next(unused_chars([text, *literals, *literals.values()]))
        pieces, controls, end = [], [], 0
        for token_id, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True):
            # A stand-in may itself be an unknown token, which is a control token too.
            if token_id in self._control_bytes and literals.keys().isdisjoint(text[start:stop]):
                pieces.append(text[end:start])
                controls.append(token_id)
                end = stop
        stand_ins = {ord(char): literal for char, literal in literals.items()}
        marked = mark.join([*pieces, text[end:]]).translate(stand_ins)
        marker = _twin(self._with_control, AddedToken(mark, special=False, normalized=False))
        mark_id, found = marker.token_to_id(mark), iter(controls)
        return [next(found) if i == mark_id else i for i in _encode(marker, marked).ids]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of ids; bytes that are no UTF-8 become U+FFFD, one for each longest piece that could have been."""
        shown: Mapping[int, bytes] = {} if skip_special_tokens else self._control_bytes
        table = self._token_bytes
        text = b"".join([shown.get(i) or table[i] for i in ids]).decode(errors="replace")
        return text.removeprefix(" ") if table.drops_space else text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token stands for; b"" for a control token and for an id that is no token."""
        return self._token_bytes[token_id]


def _encode(tokenizer: Tokenizer, text: str, add_special_tokens: bool = False) -> Encoding:
    try:  # a batch of one: `encode` would hold the interpreter all the time, a second for a megabyte
        return tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)[0]
    except TypeError:
        raise RequestError("The text holds half a surrogate pair, which is no character.") from None


def _check_sound(*tokenizers: Tokenizer) -> None:
    """The library takes parts that it then panics over, whatever the text, and a panic is no Exception."""
    try:
        for tokenizer in tokenizers:
            tokenizer.encode_batch(["Hello, world 1"], add_special_tokens=True)
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(f"The tokenizer cannot encode so much as a greeting: {error}.", REMEDY) from error


def _mark_special(tokenizer: Tokenizer, texts: Iterable[str | None]) -> None:
    known = [text for text in texts if text is not None and tokenizer.token_to_id(text) is not None]
    marked = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in known if text not in marked])


def _twin(tokenizer: Tokenizer, *extra: AddedToken) -> Tokenizer:
    """A tokenizer over the same vocabulary (shared, not copied) to which control tokens are plain text."""
    twin = Tokenizer(tokenizer.model)
    twin.normalizer = tokenizer.normalizer
    twin.pre_tokenizer = tokenizer.pre_tokenizer
    twin.post_processor = tokenizer.post_processor
    added = sorted(tokenizer.get_added_tokens_decoder().items())
    twin.add_tokens([*(token for _, token in added), *extra])
    twin.encode_special_tokens = True
    return twin
