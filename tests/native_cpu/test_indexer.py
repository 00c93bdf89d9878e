"""Choosing keys, and attention to those alone: by the torch twins, and to the last bit however steps are cut."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from blade import Batch, KeySelection
from blade_native.attention import PagedAttention
from blade_native.kv_codes import MODES
from blade_native.reference import TorchOps
from blade_native.simd.attention import SimdAttention
from blade_native.simd.library import Library
from blade_native.simd.ops import SimdOps

from .batches import ragged, spec
from .test_attention import THREADS, World

SELECTIONS = [KeySelection(4, 32, group=4, budget=64), KeySelection(2, 64, group=24, budget=48)]
LENS = [300, 65, 3, 700, 97]
OWED = [40, 1, 3, 1, 2]


class Indexed:
    """Sequences' small queries and keys."""

    def __init__(self, selection: KeySelection, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.selection, self.dim = selection, selection.head_dim
        self.batch = ragged(LENS, LENS, 16)
        self.owed = self.cut(OWED)
        angles = torch.outer(torch.arange(701).float(), 100.0 ** -torch.linspace(0, 1, self.dim // 4))
        self.cos_sin = torch.cat((angles.cos(), angles.sin()), dim=-1)
        self.weight = torch.randn(self.dim).to(dtype)
        self.q = torch.randn(sum(LENS), selection.num_heads, self.dim).to(dtype)
        self.k = torch.randn(sum(LENS), self.dim).to(dtype)

    def cut(self, owed: list[int]) -> Batch:
        """The last tokens of each sequence."""
        found = ragged(owed, LENS, 16)
        return replace(found, block_tables=self.batch.block_tables, slots=self.last(self.batch.slots, owed))

    def last(self, x: Tensor, owed: list[int]) -> Tensor:
        return torch.cat([part[len(part) - n :] for part, n in zip(x.split(LENS), owed, strict=True)])

    def kept(self, ops: TorchOps | SimdOps, *cuts: list[int]) -> Tensor:
        kept = torch.full((int(self.batch.block_tables.max()) + 1, 16, self.dim), torch.nan, dtype=self.k.dtype)
        for batch, k in ((self.batch, self.k), *((self.cut(owed), self.last(self.k, owed)) for owed in cuts)):
            ops.keep_index_keys(k, self.weight, 1e-5, self.cos_sin, batch, kept, self.selection.group)
        return kept

    def slots(self, ops: TorchOps | SimdOps, kept: Tensor, owed: list[int]) -> Tensor:
        batch = self.cut(owed)
        return ops.select_keys(self.last(self.q, owed), self.cos_sin, batch, kept, self.selection)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("selection", SELECTIONS, ids=str)
def test_keys_are_chosen_as_in_torch(library: Library, selection: KeySelection, dtype: torch.dtype) -> None:
    native, torch_ops, world = SimdOps(TorchOps(), library, THREADS), TorchOps(), Indexed(selection, dtype)
    kept, expected = world.kept(native), world.kept(torch_ops)
    torch.testing.assert_close(kept, expected, equal_nan=True, rtol=1e-2, atol={4: 1e-5, 2: 0.03}[dtype.itemsize])
    found, wanted = world.slots(native, kept, OWED), world.slots(torch_ops, kept, OWED)
    assert (found != wanted).any(dim=1).float().mean() < 0.1  # rounding may change what fits about equally
    assert torch.equal(found.lt(0), wanted.lt(0))


@pytest.mark.parametrize("selection", SELECTIONS, ids=str)
def test_a_choice_depends_on_nothing_but_its_own_sequence(library: Library, selection: KeySelection) -> None:
    world = Indexed(selection, torch.float32)
    native = SimdOps(TorchOps(), library, THREADS)
    kept, slots = world.kept(native), world.slots(native, world.kept(native), LENS)
    assert torch.equal(world.kept(native, OWED, [7, 1, 1, 30, 5]).nan_to_num(), kept.nan_to_num())
    for threads in (1, 3):
        ops = SimdOps(TorchOps(), library, threads)
        assert torch.equal(world.slots(ops, world.kept(ops), OWED), world.last(slots, OWED))


def test_of_equal_keys_the_earlier_are_chosen(library: Library) -> None:
    world = Indexed(SELECTIONS[0], torch.float32)
    world.q.zero_()
    ops = SimdOps(TorchOps(), library, THREADS)
    first = world.slots(ops, world.kept(ops), [1] * 5)[0]
    table = world.batch.block_tables[0].long()
    seen = torch.cat((torch.arange(64), torch.arange(300, 300)))
    assert torch.equal(first[:64].long(), table[seen // 16] * 16 + seen % 16)
    assert first[64:].eq(-1).all()


@pytest.mark.parametrize("kind", ["float32", "bfloat16", *(f"float32/{mode}" for mode in MODES)])
@pytest.mark.parametrize("group", [1, 4, 16])
def test_who_sees_all_keys_gets_what_attention_gives(library: Library, kind: str, group: int) -> None:
    """To the last bit; others get what the twin gives of the same keys, group by group."""
    torch.manual_seed(0)
    kv_lens, owed = [300, 17, 1, 129], [3, 17, 1, 40]
    attention = SimdAttention(PagedAttention(torch.device("cpu")), library, THREADS)
    world = World(attention, spec(6, 2, 64, kind), kv_lens)
    whole = ragged(kv_lens, kv_lens, 16)
    world.step(kv_lens, whole)
    batch = ragged(owed, kv_lens, 16)
    batch.block_tables = whole.block_tables
    batch.slots = torch.cat([s[len(s) - n :] for s, n in zip(whole.slots.split(kv_lens), owed, strict=True)])
    q, k, v = (
        torch.cat([x[len(x) - n :] for x, n in zip(xs, owed, strict=True)]) for xs in (world.q, world.k, world.v)
    )
    q, k = attention.rope_and_store(q, k, v, world.cos_sin, batch, world.layer_kv)
    expected = attention.attend(q, k, v, batch, world.layer_kv, 0.1, None)
    lists = [s[: end + 1].tolist() for s, n in zip(whole.slots.split(kv_lens), owed, strict=True)
             for end in range(len(s) - n, len(s))]  # fmt: skip
    found = attention.attend_slots(q, batch, world.layer_kv, 0.1, _slots(lists))
    assert torch.equal(found, expected)
    some = [[slot for i, slot in enumerate(own) if i // group % 3 != 1] for own in lists]
    found = attention.attend_slots(q, batch, world.layer_kv, 0.1, _slots(some))
    for row, own in enumerate(some):  # one after the other, in blocks of their own
        again = attention.attend_slots(q[row : row + 1], batch, world.layer_kv, 0.1, _slots([own]))
        assert torch.equal(again[0], found[row])


def _slots(lists: list[list[int]]) -> Tensor:
    width = max(map(len, lists)) + 1
    return torch.tensor([own + [-1] * (width - len(own)) for own in lists], dtype=torch.int32)
