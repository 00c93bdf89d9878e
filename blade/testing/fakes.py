"""A model, a tokenizer and a checkpoint small enough to read, exact enough to test an engine against."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from collections.abc import Sequence as Seq
from types import MappingProxyType
from typing import TYPE_CHECKING

from blade.types import Batch, KVCache, ModelConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_PRIME = 65521


class ByteTokenizer:
    """Every byte is a token; four control tokens follow (contracts.Tokenizer)."""

    control_tokens: Mapping[str, int] = MappingProxyType(
        {"<|bos|>": 256, "<|eos|>": 257, "<|im_start|>": 258, "<|im_end|>": 259}
    )
    eos_token_ids: tuple[int, ...] = (257, 259)
    vocab_size = 260

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [256] * add_special_tokens + list(text.encode())

    def encode_template(self, text: str, literals: Mapping[str, str] | None = None) -> list[int]:
        stand_ins = {ord(char): meant for char, meant in (literals or {}).items()}
        ids: list[int] = []
        for part in re.split(r"(<\|\w+\|>)", text):
            if part in self.control_tokens:
                ids.append(self.control_tokens[part])
            else:
                ids += part.translate(stand_ins).encode()
        return ids

    def decode(self, ids: Seq[int], skip_special_tokens: bool = True) -> str:
        pieces = (b"" if skip_special_tokens and i >= 256 else self._piece(i) for i in ids)
        return b"".join(pieces).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 256 else b""

    def _piece(self, token_id: int) -> bytes:
        return self.token_bytes(token_id) or list(self.control_tokens)[token_id - 256].encode()


class FakeModel:
    """A "decoder" whose KV cache holds the token ids themselves and whose logits hash the ids it finds there
    (contracts.Model).

    Each position weighs in differently, so a wrong slot, block table, position or context length gives wrong tokens;
    `generate` says which would have been right.
    """

    def __init__(self, vocab_size: int = ByteTokenizer.vocab_size, max_context: int = 4096) -> None:
        self.config = ModelConfig("FakeForCausalLM", vocab_size, max_context, 1, 1, 1, 1)

    def allocate(self, num_blocks: int, block_size: int) -> KVCache:
        """One layer, [num_blocks, block_size] int64, empty slots -1."""
        import torch

        return [torch.full((num_blocks, block_size), -1, dtype=torch.int64)]

    def forward(self, batch: Batch, kv: KVCache) -> Tensor:
        import torch

        stored = kv[0]
        stored.view(-1)[batch.slots] = batch.input_ids
        owners = torch.repeat_interleave(batch.cu_seqlens.diff())  # [T], which sequence a token is of
        rows = batch.logits_rows
        context = stored[batch.block_tables[owners[rows]].long()].flatten(1)  # [R, max_blocks * block_size]
        return self.logits(context, batch.positions[rows] + 1)

    def logits(self, context: Tensor, lengths: Tensor) -> Tensor:
        """[R, vocab_size] float32 after the first lengths[r] ids of context[r]; context [R, L], lengths [R]."""
        import torch

        places = torch.arange(context.shape[1], device=context.device)
        weights = (places * 7919 + 104729) % _PRIME * (places < lengths[:, None])  # [R, L]
        state = ((context + 1) * weights).sum(1, keepdim=True) % (_PRIME - 1) + 1  # [R, 1], never 0
        spread = 2 * torch.arange(self.config.vocab_size, device=context.device) + 1  # all different modulo the prime
        return (state * spread % _PRIME).float() * (8 / _PRIME)

    def generate(self, prompt_ids: Seq[int], num_tokens: int) -> list[int]:
        """The greedy continuation, computed without a cache."""
        import torch

        ids = list(prompt_ids)
        for _ in range(num_tokens):
            logits = self.logits(torch.tensor([ids]), torch.tensor([len(ids)]))
            ids.append(int(logits.argmax()))
        return ids[len(prompt_ids) :]


class TensorWeights:
    """A checkpoint in memory (contracts.Weights). `released` are the names that were given back, in order."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        self.released: list[str] = []

    def names(self) -> Collection[str]:
        return self.tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def get(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        return self.tensors[name].to(dtype or self.tensors[name].dtype)

    def release(self, names: Iterable[str]) -> None:
        self.released += names
