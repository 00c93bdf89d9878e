"""Dual chunk attention: against the definition in float64, and to the last bit where steps are cut in other ways."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from blade import Batch, DualChunks
from blade.engine.trees import ancestors, depths
from blade_native.attention import PagedAttention
from blade_native.kv_codes import INT8, hadamard, mode_of, round_heads
from blade_native.simd.attention import SimdAttention
from blade_native.simd.library import Library

from .batches import ragged, rotated, spec
from .test_attention import CONTEXT, KINDS, OTHERS, THREADS, World, atol, rounded_keys, rounded_values
from .test_attention_trees import COMB, FORKS

CHUNKS = [DualChunks(48, 64), DualChunks(13, 25), DualChunks(1, 1), DualChunks(300, 320), DualChunks(256, 511)]


@dataclass
class DualWorld(World):
    chunks: DualChunks = CHUNKS[0]

    def step(self, query_lens: list[int], batch: Batch, window: int | None = None, chunk: int | None = None) -> Tensor:
        q, k, v = (
            torch.cat([x[len(x) - owed :] for x, owed in zip(xs, query_lens, strict=True)])
            for xs in (self.q, self.k, self.v)
        )
        return self._attend(q, k, v, batch)

    def store_all(self, batch: Batch) -> None:
        size = self.spec.block_size
        for q, k, v, table in zip(self.q, self.k, self.v, batch.block_tables, strict=True):
            at = torch.arange(len(k))
            one = ragged([len(k)], [len(k)], size)
            one.block_tables, one.slots = table[None], table[at // size].long() * size + at % size
            self._attend(torch.zeros_like(q), k, v, one)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
        scale = self.spec.head_dim**-0.5
        return self.attention.attend_dual_chunks(q, k, v, self.cos_sin, batch, self.layer_kv, scale, self.chunks)

    def want(self, query_lens: list[int], window: int | None = None, chunk: int | None = None) -> Tensor:
        return torch.cat([self._want(i, owed) for i, owed in enumerate(query_lens)])

    def _want(self, seq: int, owed: int) -> Tensor:
        dtype, (length, farthest) = getattr(torch, self.spec.dtype), self.chunks
        raw_q, k, v, at = self.q[seq], self.k[seq], self.v[seq], torch.arange(len(self.k[seq]))
        k = rotated(k, self.cos_sin, at % length).to(dtype)
        mode, origin = mode_of(self.spec), torch.zeros(())
        if mode:
            k, v, origin = rounded_keys(k, mode[0]), rounded_values(v, mode[1]), kept_origin(k)
        k, v = (x.double().repeat_interleave(raw_q.shape[1] // k.shape[1], dim=1) for x in (k + origin, v))
        behind = (at[len(at) - owed :, None] // length - at // length).clamp(max=2)
        scores = torch.full((raw_q.shape[1], owed, len(at)), -torch.inf, dtype=torch.float64)
        for distance in range(3):
            turned = (at % length + distance * length).clamp(max=farthest)
            q = rotated(raw_q, self.cos_sin, turned).to(dtype)[len(at) - owed :]
            found = torch.einsum("qhd,khd->hqk", q.double(), k) * self.spec.head_dim**-0.5
            scores = torch.where(behind == distance, found, scores)
        hidden = at > at[len(at) - owed :, None]
        return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v).flatten(1)


def kept_origin(k: Tensor) -> Tensor:
    """What keys are kept relative to, which queries at several angles do notice: the first one, rounded."""
    return hadamard(round_heads(hadamard(k[:1]), INT8).widened())


def world(library: Library, shape: Any, kv_lens: list[int], chunks: DualChunks, rotary_dim: int = 0) -> DualWorld:
    attention = SimdAttention(PagedAttention(torch.device("cpu")), library, THREADS)
    return DualWorld(attention, shape, kv_lens, rotary_dim, chunks)


def check(w: DualWorld, query_lens: list[int]) -> None:
    batch = ragged(query_lens, w.kv_lens, w.spec.block_size)
    w.store_all(batch)
    torch.testing.assert_close(w.step(query_lens, batch).double(), w.want(query_lens), rtol=0, atol=atol(w.spec))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunks", CHUNKS, ids=str)
def test_ragged_batch(library: Library, chunks: DualChunks, kind: str) -> None:
    """Decodes, whole prompts, chunks of prompts and verifications at the borders of chunks; contexts that are split."""
    kv_lens = [1, 13, 26, 27, 49, 97, 145, 256, 301, 330, 600]
    check(world(library, spec(6, 2, 32, kind), kv_lens, chunks), [1, 1, 1, 27, 3, 50, 1, 5, 1, 40, 1])
    check(world(library, spec(4, 1, 64, kind, 32), [CONTEXT], chunks), [5])


@pytest.mark.parametrize("kind", OTHERS)
def test_modes(library: Library, kind: str) -> None:
    check(world(library, spec(14, 2, 64, kind), [1, 2, 33, 255, 258, 290], CHUNKS[0]), [1, 1, 33, 1, 5, 40])
    check(world(library, spec(4, 2, 80, kind), [1, 50, 65], CHUNKS[1], rotary_dim=20), [1, 1, 20])


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_before_the_farthest_it_is_attention_as_usual(library: Library, kind: str) -> None:
    chunks = DualChunks(200, 260)
    dual = world(library, spec(6, 2, 32, kind), [chunks.num_undivided, 90], chunks)
    usual = World(dual.attention, dual.spec, dual.kv_lens)
    usual.q, usual.k, usual.v = dual.q, dual.k, dual.v
    batch = ragged(dual.kv_lens, dual.kv_lens, 16)
    torch.testing.assert_close(
        dual.step(dual.kv_lens, batch), usual.step(dual.kv_lens, batch), rtol=0, atol=atol(dual.spec)
    )
    assert torch.equal(dual.step(dual.kv_lens, batch)[-90:], usual.step(dual.kv_lens, batch)[-90:])


@pytest.mark.parametrize("kind", ["bfloat16", "float32/int8", "float32/int4_affine"])
@pytest.mark.parametrize("chunks", CHUNKS[:2], ids=str)
def test_a_sequence_does_not_depend_on_its_batch_or_its_steps(library: Library, chunks: DualChunks, kind: str) -> None:
    kv_lens, owed = [CONTEXT, 270, 40, 500], [1, 3, 40, 1]
    w = world(library, spec(14, 2, 64, kind), kv_lens, chunks)
    batch = ragged(owed, kv_lens, 16)
    w.store_all(batch)
    together = w.step(owed, batch).split(owed)
    for i in range(len(owed)):
        whole = ragged([kv_lens[i]], [kv_lens[i]], 16)
        one = world(library, w.spec, [kv_lens[i]], chunks)
        one.q, one.k, one.v = [w.q[i]], [w.k[i]], [w.v[i]]
        assert torch.equal(one.step([kv_lens[i]], whole)[-owed[i] :], together[i])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("base", "parents"), [(44, FORKS), (95, COMB), (1, COMB)], ids=["forks", "comb", "first"])
def test_a_tree_is_its_paths(library: Library, base: int, parents: list[int], kind: str) -> None:
    """Rows of one draft lie in several chunks, by their depths."""
    num, seen = len(parents) + 1, ancestors(parents)
    w = world(library, spec(6, 2, 64, kind), [base + num], CHUNKS[0])
    batch = ragged([num], w.kv_lens, 16)
    w.store_all(batch)
    batch.positions[:] = base + torch.tensor(depths(parents))
    batch.ancestors = torch.tensor(seen)
    out = w.step([num], batch)
    for place, bits in enumerate(seen):
        tokens = [*range(base), *(base + i for i in range(num) if bits >> i & 1)]
        one = world(library, w.spec, [len(tokens)], w.chunks)
        one.q, one.k, one.v = ([xs[0][tokens]] for xs in (w.q, w.k, w.v))
        path = ragged([len(tokens)], one.kv_lens, 16)
        assert torch.equal(out[place], one.step([len(tokens)], path)[-1]), f"place {place}"


def test_what_the_kernels_do_not_have_is_served_by_torch_or_refused(library: Library) -> None:
    tiny = world(library, spec(4, 2, 32, "float32"), [70], CHUNKS[1])
    tiny.spec = spec(4, 2, 8, "float32")
    tiny.q, tiny.k, tiny.v = ([torch.randn(70, heads, 8)] for heads in (4, 2, 2))
    tiny.layer_kv = tiny.attention.allocate(tiny.spec, 6)[1]
    tiny.cos_sin = tiny.cos_sin[:, :8].contiguous()
    torch.testing.assert_close(tiny.step([70], ragged([70], [70], 16)).double(), tiny.want([70]), rtol=0, atol=1e-5)
    w = world(library, spec(4, 2, 32, "float32"), [3], DualChunks(500, CONTEXT + 1))
    with pytest.raises(ValueError, match="cos_sin has 701 positions, of 702"):
        w.step([3], ragged([3], [3], 16))
