"""Low-rank adapters (LoRA, Hu et al. 2021), several in one step: y += scale * B (A x) for the rows of whoever asked."""

from __future__ import annotations

import secrets
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import torch

from blade.errors import CheckpointError
from blade.nn.dora import Gain, read_gain
from blade.nn.lora_experts import AdaptedExperts, ExpertShapes, split_experts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from collections.abc import Sequence as Seq

    from torch import Tensor

    from blade.contracts import Experts, Linear, Ops
    from blade.nn.dora import Base
    from blade.nn.lora_experts import Updates
    from blade.types import LowRank

Prefixes: TypeAlias = tuple[str, ...]
Shapes: TypeAlias = "Seq[tuple[int, int]]"
NAMESPACE_BYTES = 16
HEAD = "lm_head"
TEXT_PARTS = ("language_model.", "thinker.")


@dataclass(slots=True, frozen=True)
class Update:
    """What an adapter adds to one stack of linears."""

    down: Linear  # [R, K]: the A of all of them
    up: Linear  # [N, R]: their B, scaled, each in the place of its own
    gain: Gain | None = None

    def added(self, x: Tensor, y: Tensor) -> Tensor:
        """x [T, K] and what the stack makes of it, y [T, N] -> what is to be added to y."""
        added = self.up(self.down(x), y.dtype)
        return added if self.gain is None else added + self.gain.added(y)


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
    experts: Mapping[str, Updates] = field(repr=False, default_factory=dict)  # by the mixture's prefix

    @property
    def replayable(self) -> bool:
        """Whether it is made of ops alone, so that a step may be captured."""
        return not self.experts and all(update.gain is None for update in self.updates.values())


class Adapters:
    """The linears and the embedding of one model that adapters may change, and which rows of the step under way whose
    adapter changes."""

    def __init__(self, ops: Ops, dtype: torch.dtype) -> None:
        self.ops, self.dtype = ops, dtype
        self.base: Base | None = None  # the loader's, who sets it
        self._stacks: dict[Prefixes, tuple[Shapes, Tensor | None]] = {}
        self._experts: dict[str, ExpertShapes] = {}
        self._tables: dict[str, tuple[int, int]] = {}
        self._rows: dict[int, list[tuple[Adapter, Tensor | None]]] = {}

    def wrap(self, prefixes: Prefixes, shapes: Shapes, linear: Linear, order: Tensor | None = None) -> Linear:
        """The linear over the tensors under `prefixes`, of `shapes` (N, K), open to adapters. `order` [sum of N]: where
        in the stack each of its rows was."""
        self._stacks[prefixes] = shapes, order
        return AdaptedLinear(linear, prefixes, self)

    def wrap_experts(
        self, prefix: str, shapes: ExpertShapes, experts: Experts, gate_up: Seq[Linear], down: Seq[Linear]
    ) -> Experts:
        """The experts under `prefix`.0, `prefix`.1 ..., over these linears, open to adapters."""
        self._experts[prefix] = shapes
        return AdaptedExperts(experts, gate_up, down, prefix, self)

    def wrap_embedding(self, prefix: str, shape: tuple[int, int], rows: Callable[[Tensor], Tensor]) -> AdaptedEmbedding:
        """The embedding under `prefix`, of V rows of N numbers, open to adapters."""
        self._tables[prefix] = shape
        return AdaptedEmbedding(rows, prefix, self)

    def make(self, name: str, updates: Mapping[str, LowRank]) -> Adapter:
        """Raises CheckpointError for an update of what is no linear or embedding of the model, or of another shape."""
        left, made, tables, experts = _of_text(name, updates), {}, {}, {}
        for prefix, shape in self._tables.items():
            if (part := left.get(_in_text(prefix))) and part.of_table:
                tables[prefix] = self._table_update(name, prefix, shape, left.pop(_in_text(prefix)))
        for prefixes, (shapes, order) in self._stacks.items():
            parts = [self._part(left, prefix) for prefix in prefixes]
            if any(parts):
                made[prefixes] = self._update(name, prefixes, shapes, order, parts)
        for prefix, mixture in self._experts.items():
            split_experts(name, _in_text(prefix), mixture, left)
            found = [self._expert(name, f"{prefix}.{expert}", mixture, left) for expert in range(mixture.num)]
            if any(any(pair) for pair in found):
                experts[prefix] = found
        if left:
            raise CheckpointError(
                f"The adapter {name!r} changes {min(left)}, which is nothing of the model that can be adapted."
            )
        return Adapter(name, secrets.token_bytes(NAMESPACE_BYTES), made, tables, experts)

    def _expert(
        self, name: str, prefix: str, shapes: ExpertShapes, left: dict[str, LowRank]
    ) -> tuple[Update | None, Update | None]:
        """The updates of one expert's gate and up, and of its down, taken out."""
        gate_up, down = (f"{prefix}.gate_proj", f"{prefix}.up_proj"), (f"{prefix}.down_proj",)
        first, second = ([left.pop(_in_text(linear), None) for linear in linears] for linears in (gate_up, down))
        return (
            self._update(name, gate_up, shapes.gate_up, None, first) if any(first) else None,
            self._update(name, down, shapes.down, None, second) if any(second) else None,
        )

    def _part(self, left: dict[str, LowRank], prefix: str) -> LowRank | None:
        """The update of the linear under a prefix, taken out. A linear over an embedding's tensors is the output head,
        which has a name of its own for adapters."""
        if prefix in self._tables:
            prefix = next((other for other in left if other.rpartition(".")[2] == HEAD), "")
        prefix = _in_text(prefix)
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
        gain = read_gain(prefixes, [shape[0] for shape in shapes], parts, self.base)
        row = column = 0
        for shape, part in zip(shapes, parts, strict=True):
            if part is not None:
                down[column : column + len(part.a)] = part.a
                rows = part.b.float() * part.scale
                rows = rows if gain is None else rows * gain.factors[row : row + shape[0], None]
                up[row : row + shape[0], column : column + len(part.a)] = rows
                column += len(part.a)
            row += shape[0]
        if order is not None:
            up, gain = up[order], gain and gain.of_rows(order)
        return Update(self.ops.linear(down, None), self.ops.linear(up, None), gain and gain.to(self.ops.to_device))

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
            mine, made = (x, y) if rows is None else (ops.take_rows(x, rows), ops.take_rows(y, rows))
            ops.add_rows(y, rows, update.added(mine, made))
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


def _of_text(name: str, updates: Mapping[str, LowRank]) -> dict[str, LowRank]:
    found = {_in_text(prefix): update for prefix, update in updates.items()}
    if len(found) < len(updates):
        parts = " or ".join(map(repr, TEXT_PARTS))
        raise CheckpointError(f"The adapter {name!r} changes a linear under two names, with and without {parts}.")
    return found


def _in_text(prefix: str) -> str:
    """What a model that only reads calls a part: in a checkpoint that sees or hears as well, be it the model's or the
    one that the adapter was trained on, names are longer."""
    for part in TEXT_PARTS:
        prefix = prefix.replace(part, "")
    return prefix


def _check_shape(name: str, prefix: str, part: LowRank, shape: tuple[int, int]) -> None:
    """Raise CheckpointError for an update of another shape than its linear's, (N, K)."""
    if (found := (len(part.b), part.a.shape[1])) != shape:
        raise CheckpointError(f"The adapter {name!r} has a {found} update of {prefix}, which is {shape}.")
