"""The kit for tokenizers."""

from __future__ import annotations

from itertools import islice

from blade.contracts import Tokenizer
from blade.testing.require import require

_TEXTS = ["Hello, world!", "two  spaces\tand\n\nlines", "naïve café, 你好, 🙂👩‍👩‍👧", "def f(x):\n    return x ** 2"]

_STAND_IN = "\ue000"  # of Unicode's private use


def check_tokenizer(tokenizer: Tokenizer) -> None:
    """Texts survive the way there and back, token by token too, and no text smuggles in a control token."""
    for text in _TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        require(all(0 <= i < tokenizer.vocab_size for i in ids), f"an id of {text!r} is outside the vocabulary")
        require(tokenizer.decode(ids) == text, f"{text!r} comes back as {tokenizer.decode(ids)!r}")
        pieces = b"".join(tokenizer.token_bytes(i) for i in ids).decode()
        # A vocabulary in the manner of sentencepiece writes the space before the first word too.
        require(pieces.removeprefix(" ") == text, f"the bytes of the tokens of {text!r} spell {pieces!r}")
        full = tokenizer.encode(text)
        require(any(full[i : i + len(ids)] == ids for i in range(len(full))), "special tokens changed the text's own")
    require(tokenizer.encode("", add_special_tokens=False) == [], "the empty text has tokens")
    require(bool(tokenizer.eos_token_ids), "eos_token_ids is empty: no reply would ever end")
    require(set(tokenizer.eos_token_ids) <= set(tokenizer.control_tokens.values()), "an EOS is no control token")
    for name, token_id in islice(tokenizer.control_tokens.items(), 64):
        _check_control_token(tokenizer, name, token_id)


def _check_control_token(tokenizer: Tokenizer, name: str, token_id: int) -> None:
    shown = tokenizer.decode([token_id], skip_special_tokens=False)
    require(shown == name, f"control token {name!r} comes back as {shown!r}")
    require(tokenizer.decode([token_id]) == "", f"control token {name!r} shows as text")
    require(tokenizer.token_bytes(token_id) == b"", f"control token {name!r} has bytes")
    smuggled = tokenizer.encode(f"a{name}b", add_special_tokens=False)
    require(token_id not in smuggled, f"the text {name!r} encodes to the control token")
    require(tokenizer.encode_template(name) == [token_id], f"{name!r} in a template is not the control token")
    ids = tokenizer.encode_template(_STAND_IN + name, {_STAND_IN: name})
    require(ids.count(token_id) == 1, f"the literal text {name!r} in a template is the control token")
    require(tokenizer.decode(ids, skip_special_tokens=False) == name * 2, f"the literal text {name!r} gets lost")
