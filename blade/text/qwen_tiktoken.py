"""The tokenizer of the first Qwen's folders, `qwen.tiktoken`, which go with code that is not run.

A line of it is a token in base64 and its rank, which is its id. Of all adjacent pairs that make a token tiktoken
joins the one of the lowest rank, the leftmost of equal ones. Byte-level BPE does the same when it has every way to cut
a token in two as a merge, ordered by what it makes: a token that comes about in two places does so by the same cut, for
what it is made of has gone the same way in both.
"""

from __future__ import annotations

from base64 import b64decode
from typing import TYPE_CHECKING

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from blade.errors import CheckpointError
from blade.files import read_file
from blade.text.pretokenizers import PRETOKENIZERS
from blade.text.token_bytes import byte_alphabet

if TYPE_CHECKING:
    from pathlib import Path

MOST_CUTS = 1 << 27  # of all tokens, the squares of their lengths: so much is read to find every way to cut them in two
NAME = "qwen.tiktoken"
END_TOKENS = ("<|endoftext|>", "<|im_end|>")
CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))  # after all
CHAT_TEMPLATES = {  # by generation_config.json's `chat_format`: what the folder's code does then
    "chatml": (
        "{% if messages[0].role != 'system' %}"
        "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
        "{% for each in messages %}{{ '<|im_start|>' + each.role + '\n' + each.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
}
_REMEDY = "Fetch the file anew, or pass --tokenizer-dir with a folder of Qwen1.5's, which has the same ids."


def read_qwen_tiktoken(path: Path) -> Tokenizer:
    """Raises CheckpointError for a file that is not what its name says."""
    tokens = _read_tokens(path)
    vocab = {token: rank for rank, token in enumerate(tokens)}
    if len(vocab) < len(tokens) or not vocab.keys() >= byte_alphabet().keys():
        raise CheckpointError(f"{path} has a token twice, or lacks one of the 256 bytes.", _REMEDY)
    if sum(len(token) ** 2 for token in tokens) > MOST_CUTS:
        raise CheckpointError(f"{path} has tokens of up to {max(map(len, tokens))} bytes, which are too long.", _REMEDY)
    cuts = ((token[:i], token[i:]) for token in tokens for i in range(1, len(token)))
    merges = [cut for cut in cuts if cut[0] in vocab and cut[1] in vocab]
    # tiktoken takes a word that is a token for that, however it is to be had.
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = PRETOKENIZERS["qwen2"].build()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in CONTROL_TOKENS])
    return tokenizer


def _read_tokens(path: Path) -> list[str]:
    """By rank, in byte-level BPE's alphabet."""
    alphabet = {byte: char for char, byte in byte_alphabet().items()}
    tokens = []
    for rank, line in enumerate(read_file(path).splitlines()):
        try:
            text, number = line.split()
            token, found = b64decode(text, validate=True), int(number)
        except ValueError:
            token, found = b"", -1
        if not token or found != rank:
            raise CheckpointError(f"{path}, line {rank + 1}: this is not a token in base64 and {rank}.", _REMEDY)
        tokens.append(token.decode("latin-1").translate(alphabet))
    return tokens
