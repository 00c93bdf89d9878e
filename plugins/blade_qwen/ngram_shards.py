"""Checkpoints of Qwen4-Exp, whose tables of n-grams are cut into many tensors, seen as if each were one."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch

from blade import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable
    from collections.abc import Sequence as Seq

    from torch import Tensor

    from blade.contracts import Weights

_SHARD = re.compile(r"(?P<table>.+\.ngram_embedding)\.shard_(?P<number>0|[1-9]\d{0,8})\.weight")


class JoinedShards:
    """contracts.Weights: of X.ngram_embedding.shard_0.weight, X.ngram_embedding.shard_1.weight ... [rows, D] the matrix
    X.ngram_embedding.weight; other tensors as they are."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        numbered: dict[str, dict[int, str]] = {}  # shards by table and number
        for name in weights.names():
            if match := _SHARD.fullmatch(name):
                numbered.setdefault(f"{match['table']}.weight", {})[int(match["number"])] = name
        self._shards = {table: [shards[i] for i in sorted(shards)] for table, shards in numbered.items()}
        self._shapes = {table: self._joined(shards) for table, shards in self._shards.items()}
        whole = (name for name in weights.names() if not _SHARD.fullmatch(name))
        self._names = dict.fromkeys([*whole, *self._shards])

    def names(self) -> Collection[str]:
        return self._names.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name] if name in self._shapes else self._weights.shape(name)

    def get(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """A table is put together shard by shard, for it may be most of the checkpoint."""
        if name not in self._shards:
            return self._weights.get(name, dtype)
        dtype = dtype or self._weights.get(self._shards[name][0]).dtype
        table, start = torch.empty(self._shapes[name], dtype=dtype), 0
        for shard in self._shards[name]:
            stop = start + self._weights.shape(shard)[0]
            table[start:stop] = self._weights.get(shard, dtype)
            self._weights.release([shard])
            start = stop
        return table

    def release(self, names: Iterable[str]) -> None:
        self._weights.release([shard for name in names for shard in self._shards.get(name, [name])])

    def _joined(self, shards: Seq[str]) -> tuple[int, ...]:
        """The shape of the table that they make."""
        shapes = {shard: tuple(self._weights.shape(shard)) for shard in shards}
        width = shapes[shards[0]][-1:]
        for shard, shape in shapes.items():
            if len(shape) != 2 or shape[1:] != width:
                raise CheckpointError(
                    f"Tensor {shard} has shape {shape}, by which it is no part of a table of n-grams."
                )
        return sum(rows for rows, *_ in shapes.values()), *width
