"""The part of the kit for op sets that is about choosing keys: ragged batches over scattered blocks."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

from blade.testing.attention import make_batch, rotate
from blade.testing.require import require
from blade.testing.tolerance import require_close
from blade.types import KeySelection

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from blade.contracts import Ops

_SELECTIONS = [  # beside the rotary width and the block size
    (KeySelection(num_heads=4, head_dim=32, group=4, budget=24), 16, 16),
    (KeySelection(num_heads=3, head_dim=16, group=24, budget=48), 16, 8),
    (KeySelection(num_heads=1, head_dim=24, group=1, budget=5), 8, 16),
]
_SPANS = [(0, 40), (60, 61), (90, 130), (3, 4), (26, 29), (0, 3), (149, 150)]
_MAX_CONTEXT = 150
_EPS = 1e-5


class _World(NamedTuple):
    selection: KeySelection
    block_size: int
    tables: list[list[int]]
    cos_sin: Tensor  # [_MAX_CONTEXT, rotary_dim]
    weight: Tensor  # [D]
    k: list[Tensor]  # [L, D] of whole sequences


def check_selection(ops: Ops, dtype: torch.dtype, generator: torch.Generator) -> None:
    import torch

    for selection, rotary_dim, block_size in _SELECTIONS:
        sizes = [-(-stop // block_size) for _, stop in _SPANS]
        order = torch.randperm(sum(sizes) + 1, generator=generator).tolist()
        tables = [[order.pop() for _ in range(size)] for size in sizes]
        angles = torch.arange(_MAX_CONTEXT)[:, None] * 100.0 ** -torch.linspace(0, 1, rotary_dim // 2)
        cos_sin, dim = torch.cat([angles.cos(), angles.sin()], dim=1), selection.head_dim
        weight = torch.randn(dim, generator=generator).to(dtype)
        k = [torch.randn(stop, dim, generator=generator).to(dtype) for _, stop in _SPANS]
        world = _World(selection, block_size, tables, cos_sin, weight, k)
        kept = ops.to_device(torch.full((sum(sizes) + 1, block_size, dim), torch.nan, dtype=dtype))
        for spans in ([(0, start) for start, _ in _SPANS], _SPANS, _SPANS):  # the last step comes twice
            _keep(ops, world, spans, kept)
        rows = [row.to("cpu") for row in _rows(world, kept)]
        _check_kept(world, rows)
        num_tokens = sum(stop - start for start, stop in _SPANS)
        wide = torch.randn(num_tokens, selection.num_heads + 1, dim, generator=generator).to(dtype)
        for q in (wide, torch.zeros_like(wide)):  # then all fit equally
            batch = make_batch(tables, _SPANS, block_size, ops)
            found = ops.select_keys(ops.to_device(q)[:, :-1], ops.to_device(cos_sin), batch, kept, selection)
            require(found.dtype == torch.int32, f"select_keys gave {found.dtype}, not torch.int32")
            _check_selected(world, rows, q[:, :-1], found.cpu())


def _keep(ops: Ops, world: _World, spans: list[tuple[int, int]], kept: Tensor) -> None:
    import torch

    busy = [i for i, (start, stop) in enumerate(spans) if stop > start]
    batch = make_batch([world.tables[i] for i in busy], [spans[i] for i in busy], world.block_size, ops)
    k = torch.cat([world.k[i][spans[i][0] : spans[i][1]] for i in busy])
    wide = ops.to_device(torch.cat([torch.zeros_like(k), k], dim=1))[:, k.shape[1] :]
    tensors = wide, ops.to_device(world.weight), _EPS, ops.to_device(world.cos_sin)
    ops.keep_index_keys(*tensors, batch, kept, world.selection.group)


def _rows(world: _World, kept: Tensor) -> list[Tensor]:
    """What is kept of each sequence's tokens, [L, D]."""
    return [kept[table].flatten(0, 1)[: len(k)] for table, k in zip(world.tables, world.k, strict=True)]


def _check_kept(world: _World, rows: list[Tensor]) -> None:
    group = world.selection.group
    for k, found in zip(world.k, rows, strict=True):
        expected, num = k.float(), len(k) // group
        means = k[: num * group].float().view(num, group, k.shape[1]).mean(dim=1).to(k.dtype).float()
        normed = means * (means.square().mean(-1, keepdim=True) + _EPS).rsqrt() * world.weight.float()
        turned = rotate(normed.to(k.dtype)[:, None], world.cos_sin[: num * group : group])
        expected[group - 1 :: group][:num] = turned[:, 0]
        require_close("keep_index_keys", found, expected, k.dtype, factor=4)


def _check_selected(world: _World, rows: list[Tensor], q: Tensor, found: Tensor) -> None:
    """Each choice is among the best by the keys that are kept, but for what rounding may change."""
    import torch

    group, most = world.selection.group, world.selection.budget // world.selection.group
    starts = accumulate((stop - start for start, stop in _SPANS), initial=0)
    for table, own, (start, stop), first in zip(world.tables, rows, _SPANS, starts, strict=False):
        slots = [block * world.block_size + i for block in table for i in range(world.block_size)]
        place_of = {slot: place for place, slot in enumerate(slots)}
        for position in range(start, stop):
            row = first + position - start
            seen = [slot for slot in found[row].tolist() if slot >= 0]
            places = [place_of.get(slot, -1) for slot in seen]
            num = (position + 1) // group
            tail = list(range(num * group, position + 1))
            chosen = [place // group for place in places[: len(places) - len(tail) : group]]
            expected = [g * group + i for g in chosen for i in range(group)] + tail
            require(places == expected, "select_keys: these are no whole groups and the tokens after all of them")
            in_order = sorted(set(chosen)) == chosen and all(0 <= g < num for g in chosen)
            require(in_order, "select_keys: groups come twice, or in another order than their tokens")
            require(len(chosen) == min(num, most), f"select_keys chose {len(chosen)} groups of {num}, not {most}")
            require(bool(found[row, len(seen) :].eq(-1).all()), "select_keys: there are slots behind a -1")
            if num <= most:
                continue
            turned = rotate(q[row : row + 1], world.cos_sin[position : position + 1]).to(q.dtype)[0].float()
            scores = (own[group - 1 : num * group : group].float() @ turned.T).clamp(min=0).sum(1)
            others = [g for g in range(num) if g not in chosen]
            near = 1e-4 * float(scores.max()) if q.dtype == torch.float32 else 0.02 * float(scores.max())
            best = float(scores[chosen].min()) >= float(scores[others].max()) - near
            require(best, "select_keys: a group that fits better is left out")
            if not scores.any():
                require(chosen == list(range(most)), "select_keys: of groups that fit equally the earlier ones come")
