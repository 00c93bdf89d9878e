"""Rope, KV store and paged attention against dense attention, over caches poisoned with NaN."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from blade import Batch, KVSpec
from blade_native.attention import PagedAttention
from blade_native.kv_codes import INT8, MODES, Kept, hadamard, mode_of, round_heads, transforms_values
from blade_native.simd.attention import SimdAttention
from blade_native.simd.library import Library

from .batches import attended, ragged, rotated, spec

ATOL = {"float32": 1e-5, "bfloat16": 0.03}
KINDS = [*ATOL, "float32/int8", "bfloat16/int8"]  # over all shapes; the other modes over some
OTHERS = [f"float32/{mode}" for mode in MODES if mode != "int8"]
ROUNDED_ATOL = 2e-3  # in float32
THREADS = 2
CONTEXT = 700  # beyond two spans of the kernel


def cos_sin(rotary_dim: int) -> Tensor:
    angles = torch.outer(torch.arange(CONTEXT + 1).float(), 100.0 ** -torch.linspace(0, 1, rotary_dim // 2))
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


@dataclass
class World:
    """Sequences with all their tokens' q, k and v, of which a cache holds what has been stored."""

    attention: SimdAttention
    spec: KVSpec
    kv_lens: list[int]
    rotary_dim: int = 0

    def __post_init__(self) -> None:
        dtype, spec = getattr(torch, self.spec.dtype), self.spec
        self.q = [torch.randn(n, spec.num_heads, spec.head_dim).to(dtype) for n in self.kv_lens]
        self.k = [torch.randn(n, spec.num_kv_heads, spec.head_dim).to(dtype) for n in self.kv_lens]
        self.v = [torch.randn(n, spec.num_kv_heads, spec.head_dim).to(dtype) for n in self.kv_lens]
        self.cos_sin = cos_sin(self.rotary_dim or spec.head_dim)
        num_blocks = sum(-(-n // spec.block_size) for n in self.kv_lens) + 1
        self.layer_kv = self.attention.allocate(spec, num_blocks)[1]
        for buffer in (self.layer_kv.k, self.layer_kv.v):
            buffer.fill_(255)  # NaN in every dtype, and as a scale

    def step(self, query_lens: list[int], batch: Batch, window: int | None = None, chunk: int | None = None) -> Tensor:
        """Store the owed tokens and attend with them."""
        q, k, v = (
            torch.cat([x[len(x) - owed :] for x, owed in zip(xs, query_lens, strict=True)])
            for xs in (self.q, self.k, self.v)
        )
        q, k = self.attention.rope_and_store(q, k, v, self.cos_sin, batch, self.layer_kv)
        return self.attention.attend(q, k, v, batch, self.layer_kv, self.spec.head_dim**-0.5, window, chunk)

    def store_all(self, batch: Batch) -> None:
        """As if every token before the owed ones had been computed earlier."""
        size = self.spec.block_size
        for k, v, table in zip(self.k, self.v, batch.block_tables, strict=True):
            at = torch.arange(len(k))
            batch_of_one = ragged([len(k)], [len(k)], size)
            batch_of_one.block_tables = table[None]
            batch_of_one.slots = table[at // size].long() * size + at % size
            q = torch.zeros(len(k), self.spec.num_heads, self.spec.head_dim, dtype=k.dtype)
            self.attention.rope_and_store(q, k, v, self.cos_sin, batch_of_one, self.layer_kv)

    def want(self, query_lens: list[int], window: int | None = None, chunk: int | None = None) -> Tensor:
        dtype, spec = getattr(torch, self.spec.dtype), self.spec
        parts = []
        for q, k, v, owed in zip(self.q, self.k, self.v, query_lens, strict=True):
            at = torch.arange(len(k))
            q, k = (rotated(x, self.cos_sin, at).to(dtype) for x in (q, k))
            if mode := mode_of(spec):
                k, v = rounded_keys(k, mode[0]), rounded_values(v, mode[1])
            parts.append(attended(q[len(q) - owed :], k, v, owed, spec.head_dim**-0.5, window, chunk))
        return torch.cat(parts)


def rounded(x: Tensor, kept: Kept) -> Tensor:
    return round_heads(x, kept).widened()


def rounded_keys(k: Tensor, kept: Kept) -> Tensor:
    """But for what they have in common, k [L, KV, D]."""
    k = hadamard(k)
    return hadamard(rounded(k - rounded(k[:1], INT8), kept))


def rounded_values(v: Tensor, kept: Kept) -> Tensor:
    return hadamard(rounded(hadamard(v), kept)) if transforms_values(kept) else rounded(v, kept)


def atol(spec: KVSpec) -> float:
    return max(ATOL[spec.dtype], ROUNDED_ATOL if spec.storage else 0)


def world(library: Library, spec: KVSpec, kv_lens: list[int], rotary_dim: int = 0) -> World:
    return World(SimdAttention(PagedAttention(torch.device("cpu")), library, THREADS), spec, kv_lens, rotary_dim)


def check(w: World, query_lens: list[int], window: int | None = None, chunk: int | None = None) -> None:
    batch = ragged(query_lens, w.kv_lens, w.spec.block_size)
    w.store_all(batch)
    out = w.step(query_lens, batch, window, chunk)
    torch.testing.assert_close(out.double(), w.want(query_lens, window, chunk), rtol=0, atol=atol(w.spec))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heads", [(3, 3), (6, 2), (4, 1), (14, 2), (8, 1)], ids=str)  # groups of 1, 3, 4, 7, 8
def test_ragged_batch(library: Library, heads: tuple[int, int], kind: str) -> None:
    """Decodes, whole prompts, a chunk and a verification together, lengths around block, step and span edges."""
    kv_lens = [1, 2, 16, 17, 33, 31, 255, 256, 257, 290, 20]
    check(world(library, spec(*heads, 32, kind), kv_lens), [1, 1, 1, 1, 33, 31, 1, 5, 1, 40, 0])


@pytest.mark.parametrize("kind", [*OTHERS, "bfloat16/mix_i8i4"])
def test_modes(library: Library, kind: str) -> None:
    """Groups of channels in a head, a head that is one group, and a window, in all ways of rounding."""
    check(world(library, spec(14, 2, 64, kind), [1, 2, 33, 255, 258, 290]), [1, 1, 33, 1, 5, 40])
    check(world(library, spec(4, 2, 80, kind), [1, 50, 65]), [1, 1, 20])
    check(world(library, spec(4, 1, 128, kind, 32), [300, 90]), [1, 3], window=77)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block_size", [16, 32, 64])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 256])
def test_shapes(library: Library, head_dim: int, block_size: int, kind: str) -> None:
    check(world(library, spec(4, 2, head_dim, kind, block_size), [1, 50, 65, 40]), [1, 1, 20, 40])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [1, 5, 64, 300])
def test_window(library: Library, window: int, kind: str) -> None:
    check(world(library, spec(6, 2, 32, kind), [3, 90, 330, 600]), [3, 1, 30, 1], window)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [1, 20, 256])
def test_chunks_of_positions(library: Library, chunk: int, kind: str) -> None:
    """Queries at the end of a chunk, at the beginning of one, and of several; long contexts split over threads."""
    check(world(library, spec(6, 2, 32, kind), [3, 90, 330, 600, 257, 256]), [3, 1, 30, 1, 1, 2], chunk=chunk)
    check(world(library, spec(4, 1, 32, kind), [700]), [5], chunk=chunk * 300)


@pytest.mark.parametrize("kind", KINDS)
def test_long_context_of_one_sequence_is_split(library: Library, kind: str) -> None:
    check(world(library, spec(4, 1, 64, kind), [CONTEXT]), [1])
    check(world(library, spec(4, 1, 64, kind), [CONTEXT]), [5], 400)


@pytest.mark.parametrize("kind", [*KINDS, *OTHERS])
def test_contexts_of_all_lengths_are_split_to_the_same_bits(library: Library, kind: str) -> None:
    """Side by side with others of few rows and spans, or of many."""
    kv_lens, owed = [5, CONTEXT, 129, 300], [1, 1, 2, 1]
    w = world(library, spec(4, 1, 96, kind, 32), kv_lens)
    batch = ragged(owed, kv_lens, 32)
    w.store_all(batch)
    found = []
    for threads in (1, 3):
        w.attention = SimdAttention(PagedAttention(torch.device("cpu")), library, threads)
        found.append([w.step(owed, batch, *reach) for reach in ((None, None), (200, None), (None, 250))])
    assert all(torch.equal(*both) for both in zip(*found, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_rotary_part_of_a_head(library: Library, kind: str) -> None:
    check(world(library, spec(4, 2, 80, kind), [20, 9], rotary_dim=20), [20, 1])


@pytest.mark.parametrize("kind", [*KINDS, *OTHERS])
def test_a_sequence_does_not_depend_on_its_batch(library: Library, kind: str) -> None:
    kv_lens, owed = [CONTEXT, 270, 40, 500], [1, 3, 40, 1]
    w = world(library, spec(14, 2, 64, kind), kv_lens)
    batch = ragged(owed, kv_lens, 16)
    w.store_all(batch)
    together = w.step(owed, batch).split(owed)
    for i in range(len(owed)):
        alone = ragged([owed[i]], [kv_lens[i]], 16)
        alone.block_tables = batch.block_tables[i : i + 1].contiguous()
        alone.slots = batch.slots.split(owed)[i]
        w.q, w.k, w.v, qkv = [w.q[i]], [w.k[i]], [w.v[i]], (w.q, w.k, w.v)
        torch.testing.assert_close(w.step([owed[i]], alone), together[i], rtol=0, atol=0)
        w.q, w.k, w.v = qkv


@pytest.mark.parametrize("kind", ["bfloat16", "float32/int8", "bfloat16/int8", *OTHERS])
def test_chunks_equal_the_whole_prompt(library: Library, kind: str) -> None:
    w = world(library, spec(14, 2, 64, kind), [300])
    whole, (q, k, v) = ragged([300], [300], 16), (w.q[0], w.k[0], w.v[0])
    want = w.step([300], whole)
    for start, end in ((0, 7), (7, 270), (270, 300)):
        chunk = ragged([end - start], [end], 16)
        chunk.block_tables = whole.block_tables.roll(1, 1).contiguous()  # in other blocks
        table = chunk.block_tables[0].long()
        chunk.slots = table[chunk.positions // 16] * 16 + chunk.positions % 16
        w.q, w.k, w.v = [q[:end]], [k[:end]], [v[:end]]
        torch.testing.assert_close(w.step([end - start], chunk), want[start:end], rtol=0, atol=0)


def test_what_all_keys_share_costs_int8_no_precision(library: Library) -> None:
    """In some models a bias makes a few channels of all keys a hundred times as large as what tells them apart."""
    w = world(library, spec(4, 2, 64, "float32/int8"), [300])
    w.cos_sin = w.cos_sin[:1].expand_as(w.cos_sin).contiguous()  # no rotation
    plain = world(library, spec(4, 2, 64, "float32"), [300])
    plain.q, plain.k, plain.v, plain.cos_sin = w.q, w.k, w.v, w.cos_sin
    w.k[0][:, :, 28:32] += 100
    batch = ragged([300], [300], 16)
    torch.testing.assert_close(w.step([300], batch), plain.step([300], batch), rtol=0, atol=0.05)


def test_q_k_and_v_may_be_slices_of_one_projection(library: Library) -> None:
    w = world(library, spec(4, 2, 32, "float32"), [40])
    batch = ragged([40], [40], 16)
    want = w.step([40], batch)
    fused = torch.cat([x[0].flatten(1) for x in (w.q, w.k, w.v)], dim=1)
    q, k, v = (x.unflatten(1, (-1, 32)) for x in fused.split((128, 64, 64), dim=1))
    q, k = w.attention.rope_and_store(q, k, v, w.cos_sin, batch, w.layer_kv)
    torch.testing.assert_close(w.attention.attend(q, k, v, batch, w.layer_kv, 32**-0.5, None), want, rtol=0, atol=0)


def test_shapes_the_kernels_lack_are_served_by_torch(library: Library) -> None:
    attention = SimdAttention(PagedAttention(torch.device("cpu")), library, THREADS)
    tiny = spec(4, 2, 8, "float32")
    assert attention.block_bytes(tiny) == 2 * 2 * 16 * 2 * 8 * 4
    (layer_kv, _) = attention.allocate(tiny, 3)
    batch = ragged([20], [20], 16)
    q, k, v = torch.randn(20, 4, 8), *torch.randn(2, 20, 2, 8)
    q, k = attention.rope_and_store(q, k, v, cos_sin(8), batch, layer_kv)
    out = attention.attend(q, k, v, batch, layer_kv, 8**-0.5, None)
    torch.testing.assert_close(out.double(), attended(q, k, v, 20, 8**-0.5, None), rtol=0, atol=1e-5)


def test_wrong_input_is_refused(library: Library) -> None:
    w = world(library, spec(4, 2, 32, "float32"), [3])
    batch = ragged([3], [3], 16)
    (q,), (k,), (v,) = w.q, w.k, w.v
    with pytest.raises(TypeError, match="q is "):
        w.attention.attend(q.bfloat16(), k, v, batch, w.layer_kv, 1.0, None)
    with pytest.raises(ValueError, match="k has shape"):
        w.attention.rope_and_store(q, q, v, w.cos_sin, batch, w.layer_kv)
    with pytest.raises(ValueError, match="side by side"):
        w.attention.attend(q.transpose(0, 1).contiguous().transpose(0, 1), k, v, batch, w.layer_kv, 1.0, None)
    with pytest.raises(ValueError, match="rotary_dim 34"):
        w.attention.rope_and_store(q, k, v, cos_sin(34), batch, w.layer_kv)
