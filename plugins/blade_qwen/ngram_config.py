"""config.json's words on the embeddings of n-grams that some layers of Qwen4-Exp have."""

from __future__ import annotations

from dataclasses import dataclass

from blade import StateTensor
from blade.nn import Keys

MAX_LENGTH, MAX_HEADS = 16, 64  # beyond them config.json could keep a start busy for minutes


@dataclass(slots=True, frozen=True)
class NgramConfig:
    """The n-grams of 2 to `length` tokens, the last one each token's own, and how they are hashed."""

    layers: tuple[int, ...]  # which have a table
    length: int
    num_heads: int  # places in the table, for each length of n-gram
    width: int  # of what a token's n-grams have there, all together
    window: int  # inputs that the convolution over it has weights for, `length` tokens apart
    smallest_range: int  # rows of the table that a head has to itself
    multiple_of: int  # rows of the whole table
    seed: int
    vocab_size: int
    boundary: int  # id of the token that no n-gram reaches beyond; it stands for those that are not there

    @classmethod
    def read(cls, keys: Keys) -> NgramConfig | None:
        """None: no layer has a table."""
        if not keys.integers("ple_layer_ids", []):
            return None
        length = keys.integer("ngram_size", 3, minimum=2, maximum=MAX_LENGTH)
        num_heads = keys.integer("heads_per_ngram", 8, maximum=MAX_HEADS)
        width = keys.integer("ple_embed_dim", keys.integer("hidden_size"))
        if width % ((length - 1) * num_heads):
            keys.refuse("ple_embed_dim", f"a multiple of the {(length - 1) * num_heads} n-gram heads")
        return cls(
            layers=_layers(keys),
            length=length,
            num_heads=num_heads,
            width=width,
            window=keys.integer("ple_conv_kernel_size", 4, minimum=2),
            smallest_range=keys.integer("ngram_vocab_size_base", 20_000_000),
            multiple_of=keys.integer("make_ngram_vocab_size_divisible_by", 128),
            seed=keys.integer("seed", 1234, minimum=0),
            vocab_size=keys.integer("vocab_size"),
            boundary=_boundary(keys),
        )

    @property
    def reach(self) -> int:
        """Tokens before its own that the convolution sees."""
        return (self.window - 1) * self.length

    def state(self, num_channels: int) -> tuple[StateTensor, StateTensor]:
        """The convolution's last inputs; the last tokens' ids, the newest last."""
        return StateTensor((num_channels, self.reach)), StateTensor((self.length - 1,), "int64")


def _layers(keys: Keys) -> tuple[int, ...]:
    """Which config.json counts from 1."""
    num_layers, numbers = keys.num_layers(), sorted(set(keys.integers("ple_layer_ids")))
    if numbers[0] < 1 or numbers[-1] > num_layers:
        keys.refuse("ple_layer_ids", f"numbers of layers, from 1 to {num_layers}")
    return tuple(number - 1 for number in numbers)


def _boundary(keys: Keys) -> int:
    if type(keys.values.get("eos_token_id")) is not list:
        return keys.integer("eos_token_id", minimum=0)
    several = keys.integers("eos_token_id")
    return several[0] if several else keys.refuse("eos_token_id", "a token's id, where ple_layer_ids are given")
