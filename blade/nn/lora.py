"""Low-rank adapters (LoRA, Hu et al. 2021), several in one step: y += scale * B (A x) for the rows of whoever asked."""

from __future__ import annotations

import secrets
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import torch

from blade.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from collections.abc import Sequence as Seq

    from torch import Tensor

    from blade.contracts import Linear, Ops
    from blade.types import LowRank

Prefixes: TypeAlias = tuple[str, ...]
Shapes: TypeAlias = "Seq[tuple[int, int]]"
NAMESPACE_BYTES = 16
HEAD = "lm_head"


@dataclass(slots=True, frozen=True)
class Update:
    """What an adapter adds to one stack of linears."""

    down: Linear  # [R, K]: the A of all of them
    up: Linear  # [N, R]: their B, scaled, each in the place of its own

    def __call__(self, x: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        return self.up(self.down(x), out_dtype)


@dataclass(slots=True, frozen=True)
class TableUpdate:
    """What an adapter adds to an embedding."""

    down: Callable[[Tensor], Tensor]  # ids to rows of A, transposed: [V, r]
    up: Linear  # [N, r]: B, scaled

    def __call__(self, ids: Tensor) -> Tensor:
        return self.up(self.down(ids))


@dataclass(frozen=True, eq=False)
class Adapter:
    """One adapter, ready for a model."""

    name: str
    namespace: bytes  # of the prefix cache: no other adapter has it, not even a later one of the same name
    updates: Mapping[Prefixes, Update] = field(repr=False)
    tables: Mapping[str, TableUpdate] = field(repr=False)


class Adapters:
    """The linears and the embedding of one model that adapters may change, and which rows of the step under way whose
    adapter changes."""

    def __init__(self, ops: Ops, dtype: torch.dtype) -> None:
        self.ops, self.dtype = ops, dtype
        self._stacks: dict[Prefixes, tuple[Shapes, Tensor | None]] = {}
        self._tables: dict[str, tuple[int, int]] = {}
        self._rows: dict[int, list[tuple[Adapter, Tensor | None]]] = {}

    def wrap(self, prefixes: Prefixes, shapes: Shapes, linear: Linear, order: Tensor | None = None) -> Linear:
        """The linear over the tensors under `prefixes`, of `shapes` (N, K), open to adapters. `order` [sum of N]: where
        in the stack each of its rows was."""
        self._stacks[prefixes] = shapes, order
        return AdaptedLinear(linear, prefixes, self)

    def wrap_embedding(self, prefix: str, shape: tuple[int, int], rows: Callable[[Tensor], Tensor]) -> AdaptedEmbedding:
        """The embedding under `prefix`, of V rows of N numbers, open to adapters."""
        self._tables[prefix] = shape
        return AdaptedEmbedding(rows, prefix, self)

    def make(self, name: str, updates: Mapping[str, LowRank]) -> Adapter:
        """Raises CheckpointError for an update of what is no linear or embedding of the model, or of another shape."""
        left, made, tables = dict(updates), {}, {}
        for prefix, shape in self._tables.items():
            if prefix in left and left[prefix].of_table:
                tables[prefix] = self._table_update(name, prefix, shape, left.pop(prefix))
        for prefixes, (shapes, order) in self._stacks.items():
            parts = [self._part(left, prefix) for prefix in prefixes]
            if any(parts):
                made[prefixes] = self._update(name, prefixes, shapes, order, parts)
        if left:
            raise CheckpointError(
                f"The adapter {name!r} changes {min(left)}, which is nothing of the model that can be adapted."
            )
        return Adapter(name, secrets.token_bytes(NAMESPACE_BYTES), made, tables)

    def _part(self, left: dict[str, LowRank], prefix: str) -> LowRank | None:
        """The update of the linear under a prefix, taken out. A linear over an embedding's tensors is the output head,
        which has a name of its own for adapters."""
        if prefix in self._tables:
            prefix = next((other for other in left if other.rpartition(".")[2] == HEAD), "")
        return left.pop(prefix) if prefix in left and not left[prefix].of_table else None

    def _table_update(self, name: str, prefix: str, shape: tuple[int, int], part: LowRank) -> TableUpdate:
        _check_shape(name, prefix, part, (shape[1], shape[0]))
        table = part.a.T.to(self.dtype).contiguous()
        up = self.ops.linear((part.b.float() * part.scale).to(self.dtype), None)
        return TableUpdate(self.ops.embedding(self.ops.to_device(table)), up)

    def _update(
        self, name: str, prefixes: Prefixes, shapes: Shapes, order: Tensor | None, parts: Seq[LowRank | None]
    ) -> Update:
        for prefix, shape, part in zip(prefixes, shapes, parts, strict=True):
            if part is not None:
                _check_shape(name, prefix, part, shape)
        rank, n = sum(len(part.a) for part in parts if part), sum(shape[0] for shape in shapes)
        down, up = torch.empty(rank, shapes[0][1], dtype=self.dtype), torch.zeros(n, rank, dtype=self.dtype)
        row = column = 0
        for shape, part in zip(shapes, parts, strict=True):
            if part is not None:
                down[column : column + len(part.a)] = part.a
                up[row : row + shape[0], column : column + len(part.a)] = part.b.float() * part.scale
                column += len(part.a)
            row += shape[0]
        up = up if order is None else up[order]
        return Update(self.ops.linear(down, None), self.ops.linear(up, None))

    @contextmanager
    def chosen(self, *ways: Seq[Adapter | None]) -> Iterator[None]:
        """While it lasts, linears change their rows: `ways` has for each number of rows that the model works on (the
        step's tokens, the rows of logits) the adapter of every row. Where the numbers are equal the rows are too."""
        self._rows = {len(way): self._groups(way) for way in ways}
        try:
            yield
        finally:
            self._rows = {}

    def _groups(self, rows: Seq[Adapter | None]) -> list[tuple[Adapter, Tensor | None]]:
        places: dict[Adapter, list[int]] = {}
        for row, adapter in enumerate(rows):
            if adapter is not None:
                places.setdefault(adapter, []).append(row)
        return [
            (adapter, None if len(at) == len(rows) else self.ops.to_device(torch.tensor(at)))
            for adapter, at in places.items()
        ]

    def of(self, num_rows: int) -> list[tuple[Adapter, Tensor | None]]:
        """The adapters of a step's rows, each with its rows; None for all of them."""
        return self._rows[num_rows] if self._rows else []


class AdaptedLinear:
    """contracts.Linear: another one and what adapters add to it."""

    def __init__(self, base: Linear, prefixes: Prefixes, adapters: Adapters) -> None:
        self.base, self._prefixes, self._adapters = base, prefixes, adapters

    def __call__(self, x: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        y = self.base(x, out_dtype)
        for adapter, rows in self._adapters.of(len(x)):
            update = adapter.updates.get(self._prefixes)
            if update is None:
                continue
            ops = self._adapters.ops
            ops.add_rows(y, rows, update(x if rows is None else ops.take_rows(x, rows), out_dtype))
        return y


class AdaptedEmbedding:
    """Another embedding and what adapters add to it."""

    def __init__(self, base: Callable[[Tensor], Tensor], prefix: str, adapters: Adapters) -> None:
        self._base, self._prefix, self._adapters = base, prefix, adapters

    def __call__(self, ids: Tensor) -> Tensor:
        y = self._base(ids)
        for adapter, rows in self._adapters.of(len(ids)):
            if (update := adapter.tables.get(self._prefix)) is not None:
                self._adapters.ops.add_rows(y, rows, update(ids if rows is None else ids[rows]))
        return y


def _check_shape(name: str, prefix: str, part: LowRank, shape: tuple[int, int]) -> None:
    """Raise CheckpointError for an update of another shape than its linear's, (N, K)."""
    if (found := (len(part.b), part.a.shape[1])) != shape:
        raise CheckpointError(f"The adapter {name!r} has a {found} update of {prefix}, which is {shape}.")
