"""What goes around a text that is encoded with special tokens."""

from __future__ import annotations

from tokenizers import Tokenizer, processors

from blade.errors import CheckpointError


def surround(tokenizer: Tokenizer, bos: str | None, eos: str | None) -> None:
    """From now on `bos` goes before every text and `eos` after it; None: nothing does. Raises CheckpointError."""
    around = [token for token in (bos, eos) if token is not None]
    single = [*([bos] if bos is not None else []), "$A", *([eos] if eos is not None else [])]
    ids = [(token, _id_of(tokenizer, token)) for token in around]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)


def _id_of(tokenizer: Tokenizer, token: str) -> int:
    token_id = tokenizer.token_to_id(token)
    if token_id is None:
        raise CheckpointError(f"The tokenizer is to add {token!r} to texts, but that is not in its vocabulary.")
    return token_id
