"""Tables of n-grams: what a layer of Qwen4-Exp knows of a token by its id and those of the tokens before it."""

from __future__ import annotations

from itertools import accumulate, count, islice
from math import isqrt
from typing import TYPE_CHECKING

import torch

from blade import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from blade import Batch
    from blade.contracts import Loader
    from blade_qwen.ngram_config import NgramConfig

WORD = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


class NgramTable:
    """An n-gram has a row for each of its length's heads: a hash of its ids, within the head's range of rows."""

    def __init__(self, name: str, config: NgramConfig, index: int, loader: Loader) -> None:
        """`index`: of the layer, among those that have a table."""
        self.config = config
        sizes, shape = ranges(config, index), (config.length - 1, config.num_heads, 1)
        *starts, end = accumulate(sizes, initial=0)
        self.factors = _stored(f"{name}.layer_multipliers", multipliers(config, index), loader)
        self.sizes = _stored(f"{name}.ngram_heads_vocab_sizes", sizes, loader).view(shape)
        self.starts = _stored(f"{name}.ngram_heads_offsets", starts, loader).view(shape)
        num_rows = -(-end // config.multiple_of) * config.multiple_of
        self.rows = loader.embedding(f"{name}.ngram_embedding", (num_rows, config.width // len(sizes)))

    def __call__(self, batch: Batch, state: Tensor) -> Tensor:
        """[T, width]; state [num_slots, length - 1] int64, as NgramConfig.state says."""
        places = self.places(last_ids(batch, state, self.config.boundary))
        return torch.cat([self.rows(head) for head in places], dim=1)  # an adapter knows whose rows T are

    def places(self, ids: list[Tensor]) -> Tensor:
        """ids[i] [T]: of the tokens i before each -> rows of the table [(length - 1) * num_heads, T]."""
        boundary, before, mixed = self.config.boundary, ids[1], ids[0] * self.factors[0]
        found = []
        for distance in range(1, self.config.length):
            if distance > 1:
                before = torch.where(before == boundary, boundary, ids[distance])  # once met, it hides all before it
            mixed = mixed ^ (before * self.factors[distance])
            found.append(mixed % self.sizes[distance - 1] + self.starts[distance - 1])
        return torch.cat(found)


def last_ids(batch: Batch, state: Tensor, boundary: int) -> list[Tensor]:
    """The ids of the batch's tokens, of those before them, and so on, [T] int64 each, as far back as `state`,
    [num_slots, N] int64, reaches; `boundary` before a sequence's first. The state is read and written as by
    contracts.Ops.short_conv."""
    if batch.state_in is None or batch.state_out is None:
        raise ValueError("the batch says nothing of the slots of states")
    num_kept, device = state.shape[1], state.device
    kept, slots = torch.arange(num_kept, device=device), batch.state_in.long()
    held = torch.where(slots.unsqueeze(1) < 0, boundary, state[slots.clamp(min=0)])  # [B, N]
    # All sequences in one line, what is held of each before its tokens.
    starts, seqs = batch.cu_seqlens.long(), torch.arange(len(slots), device=device)
    num_tokens = len(batch.input_ids)
    owners = torch.repeat_interleave(seqs, starts.diff(), output_size=num_tokens)
    places = torch.arange(num_tokens, device=device) + num_kept * (owners + 1)
    begins, ends = starts[:-1] + num_kept * seqs, starts[1:] + num_kept * (seqs + 1)
    line = state.new_empty(num_tokens + held.numel())
    line[begins.unsqueeze(1) + kept] = held
    line[places] = batch.input_ids
    written = batch.state_out >= 0
    state[batch.state_out[written].long()] = line[ends.unsqueeze(1) - num_kept + kept][written]
    return [line[places - distance] for distance in range(num_kept + 1)]


def ranges(config: NgramConfig, index: int) -> list[int]:
    """Rows of each head: the primes from `smallest_range` on, the next ones in each table."""
    num_heads = (config.length - 1) * config.num_heads
    primes = filter(_is_prime, count(config.smallest_range))
    return list(islice(primes, index * num_heads, (index + 1) * num_heads))


def multipliers(config: NgramConfig, index: int) -> list[int]:
    """Of the ids in an n-gram, its last token's first: odd, and so small that no product is beyond 63 bits."""
    half = max(1, ((1 << 63) - 1) // config.vocab_size // 2)
    seed = config.seed + 10007 * index
    return [2 * (_scrambled(seed + GOLDEN * (i + 2)) % half) + 1 for i in range(config.length)]


def _scrambled(state: int) -> int:
    """What SplitMix64 (Steele, Lea & Flood 2014) makes of a state, 64 bits."""
    state &= WORD
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & WORD
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB & WORD
    return state ^ (state >> 31)


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, isqrt(number) + 1))


def _stored(name: str, numbers: list[int], loader: Loader) -> Tensor:
    """What follows from config.json, int64 on the device. Checkpoints hold it as well: raises CheckpointError where
    theirs is another."""
    if loader.has(name):
        found = loader.tensor(name, (len(numbers),), torch.int64)
        if not found.is_meta and found.tolist() != numbers:
            raise CheckpointError(f"Tensor {name} is not what follows from config.json's seed, vocab_size and ngram_*.")
    return loader.ops.to_device(torch.tensor(numbers))
