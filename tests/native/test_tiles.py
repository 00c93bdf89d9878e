"""How a step is cut into tiles, and what the attention over them must never do."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from blade import KVSpec
from blade.testing.attention import make_batch
from blade_native.attention import PagedAttention
from blade_native.cpu import CpuOps
from blade_native.tiles import Piece, Reach, cut, group

OPS = CpuOps()
SPEC = KVSpec(1, 4, 2, 16, "float32", 16)
COS_SIN = torch.rand(512, 16)


def test_cut_at_multiples_of_the_sequence() -> None:
    assert list(cut([1, 70, 3], [9, 100, 3], 32)) == [
        Piece(seq=0, first_row=0, num_queries=1, kv_end=9),
        Piece(seq=1, first_row=1, num_queries=2, kv_end=32),
        Piece(seq=1, first_row=3, num_queries=32, kv_end=64),
        Piece(seq=1, first_row=35, num_queries=32, kv_end=96),
        Piece(seq=1, first_row=67, num_queries=4, kv_end=100),
        Piece(seq=2, first_row=71, num_queries=3, kv_end=3),
    ]


def test_group_by_queries_and_length() -> None:
    lens = [1000, 10, 950, 60, 70, 500]
    tiles = group(cut([1, 1, 1, 1, 1, 2], lens, 32), max_keys=10**6)
    assert [[piece.kv_end for piece in tile] for tile in tiles] == [[500], [1000, 950], [70, 60, 10]]
    assert [len(tile) for tile in group(cut([1] * 9, [100] * 9, 32), max_keys=400)] == [4, 4, 1]
    assert [len(tile) for tile in group(cut([32, 32], [64, 64], 32), max_keys=10**6)] == [1, 1]


def draw(num_tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(num_tokens, heads, 16, generator=generator) for heads in (4, 2, 2))
    return q, k, v


def attend(attention: PagedAttention, kv, tables, spans, qkv, window=None) -> torch.Tensor:
    batch = make_batch(tables, spans, 16, OPS)
    q, k = attention.rope_and_store(*qkv, COS_SIN, batch, kv[0])
    return attention.attend(q, k, qkv[2], batch, kv[0], 0.25, window)


@pytest.mark.parametrize("window", [None, 24])
def test_poison_left_in_a_block_does_not_reach_its_next_owner(window: int | None) -> None:
    clean, poisoned = draw(40), draw(40)
    outs = []
    for poison in (0.0, float("nan")):
        attention = PagedAttention(OPS.device)
        kv = attention.allocate(SPEC, 4)
        attend(attention, kv, [[0, 1, 2]], [(0, 40)], [x * 0 + poison for x in poisoned])
        attend(attention, kv, [[3]], [(0, 7)], [x * 0 + poison for x in draw(7)])  # block 0 pads short tables, too
        outs.append(attend(attention, kv, [[2, 1], [3]], [(0, 25), (0, 3)], [x[:28] for x in clean], window))
    assert outs[1].isfinite().all()
    assert torch.equal(*outs)


def test_a_live_neighbour_with_infinite_values_hurts_only_itself() -> None:
    attention = PagedAttention(OPS.device)
    kv = attention.allocate(SPEC, 8)
    q, k, v = draw(102)
    v[2:] = float("inf")
    out = attend(attention, kv, [[7], [0, 1, 2, 3, 4, 5, 6]], [(0, 2), (0, 100)], (q, k, v))
    assert out[:2].isfinite().all()
    q, k, v = draw(2, seed=1)
    out = attend(attention, kv, [[7], [0, 1, 2, 3, 4, 5, 6]], [(2, 3), (100, 101)], (q, k, v))
    assert out[0].isfinite().all()
    assert not out[1].isfinite().all()


def test_a_sequence_gets_the_same_in_any_company() -> None:
    lens = [5, 100, 33, 64, 300, 17, 280, 96, 2, 150]
    tables = [[i * 20 + j for j in range(20)] for i in range(len(lens))]
    together, apart = PagedAttention(OPS.device), PagedAttention(OPS.device)
    kv_together, kv_apart = together.allocate(SPEC, 200), apart.allocate(SPEC, 200)
    for step in range(3):
        spans = [(0, n) if step == 0 else (n + step - 1, n + step) for n in lens]
        qkv = draw(sum(stop - start for start, stop in spans), seed=step)
        out = attend(together, kv_together, tables, spans, qkv)
        row = 0
        for table, (start, stop) in zip(tables, spans, strict=True):
            part = [x[row : row + stop - start] for x in qkv]
            alone = attend(apart, kv_apart, [table], [(start, stop)], part)
            torch.testing.assert_close(out[row : row + stop - start], alone, rtol=1e-6, atol=1e-6)
            row += stop - start


class LargestResult(TorchDispatchMode):
    """Notes the most memory that any operation returned anew."""

    num_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and func._schema.returns[0].alias_info is None:
                self.num_bytes = max(self.num_bytes, tensor.nbytes)
        return result


def test_no_step_copies_the_cache() -> None:
    attention = PagedAttention(OPS.device)
    kv = attention.allocate(SPEC, 4096)
    with LargestResult() as largest:
        attend(attention, kv, [[5, 7], [9]], [(0, 20), (3, 4)], draw(21))
    assert 0 < largest.num_bytes < kv[0].kv.nbytes / 100


def test_memory_of_a_long_prompt_grows_with_its_length_not_its_square() -> None:
    spec = KVSpec(1, 16, 1, 16, "float32", 16)
    cos_sin = torch.rand(8192, 16)
    peaks = []
    for length in (2048, 4096):
        attention = PagedAttention(OPS.device)
        kv = attention.allocate(spec, length // 16)
        batch = make_batch([list(range(length // 16))], [(0, length)], 16, OPS)
        q, k, v = (torch.randn(length, heads, 16) for heads in (16, 1, 1))
        q, k = attention.rope_and_store(q, k, v, cos_sin, batch, kv[0])
        attention.attend(q, k, v, batch, kv[0], 0.25, None)
        storages = {tile.bias.untyped_storage().data_ptr(): tile.bias for tile in attention._plan._tiles[Reach()]}
        peaks.append(sum(bias.untyped_storage().nbytes() for bias in storages.values()))
    assert peaks[1] <= 2 * peaks[0]
