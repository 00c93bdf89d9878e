"""Dual chunk attention in the attention kernels: against its definition in float64, and against the torch twin."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from native_cpu.batches import ragged, rotated
from torch import Tensor

from blade import Batch, DualChunks
from blade_native.attention import PagedAttention
from blade_native.cuda import attention as attention_module
from blade_native.cuda.attention import LayerKV
from blade_native.cuda.attention_kernels import DUAL, AttentionKernels, Shape
from blade_native.cuda.launch import Launcher
from blade_native.kv_codes import hadamard

from .attention_world import (
    ATOL,
    BF16,
    F16,
    F32,
    FP8,
    INT8,
    World,
    attention,
    cos_sin,
    keys_as_stored,
    kv_spec,
    origin,
    put,
    related,
    values_as_stored,
)

CHUNKS = [DualChunks(48, 64), DualChunks(13, 25), DualChunks(1, 1), DualChunks(256, 511)]
PLAIN, SIMT = Shape(BF16, None, 64), Shape(F32, None, 64)
RELATED = [Shape(F16, INT8, 128), Shape(BF16, FP8, 128), Shape(BF16, "int4_affine", 96), Shape(F32, "mix_i8i4", 80)]


@pytest.fixture(scope="module")
def kernels(launcher: Launcher) -> AttentionKernels:
    kernels = AttentionKernels(launcher)
    shapes = [PLAIN, SIMT, *RELATED]
    kernels.add(shapes)
    kernels.add(shapes, DUAL)
    return kernels


@dataclass
class DualWorld(World):
    chunks: DualChunks = CHUNKS[0]

    def store_past(self, query_lens: list[int]) -> None:
        for k, v, slots, n in zip(self.k, self.v, self.whole.slots.split(self.kv_lens), query_lens, strict=True):
            past = len(k) - n
            if past == 0:
                continue
            keys = rotated(k[:past], self.cos_sin, torch.arange(past) % self.chunks.length).to(k.dtype)
            put(self.layer_kv, 0, related(self.layer_kv, keys, slots[0]), slots[:past])
            put(self.layer_kv, 1, v[:past], slots[:past])

    def step(
        self,
        query_lens: list[int],
        window: int | None = None,
        batch: Batch | None = None,
        chunk: int | None = None,
    ) -> Tensor:
        q, k, v = (self.last(xs, query_lens) for xs in (self.q, self.k, self.v))
        return self.attend(q, k, v, batch or self.owed(query_lens))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
        cos_sin = self.cos_sin[: self.chunks.num_undivided]
        return self.attention.attend_dual_chunks(q, k, v, cos_sin, batch, self.layer_kv, self.scale, self.chunks)

    def want(self, query_lens: list[int], window: int | None = None, chunk: int | None = None) -> Tensor:
        return torch.cat([self._want(seq, owed) for seq, owed in enumerate(query_lens)])

    def _want(self, seq: int, owed: int) -> Tensor:
        """In float64, every pair of a query and a key turned as DualChunks has it."""
        (length, farthest), dtype = self.chunks, self.shape.dtype
        raw_q, at, num = self.q[seq], self.positions(seq), self.kv_lens[seq]
        k = rotated(self.k[seq], self.cos_sin, at % length).to(dtype)
        keys, v = keys_as_stored(k, self.shape).double(), values_as_stored(self.v[seq], self.shape).double()
        if self.shape.related:  # queries at several angles do notice what the keys have in common
            keys = keys + hadamard(origin(hadamard(k), self.shape))
        groups = self.heads[0] // self.heads[1]
        keys, v = (x.repeat_interleave(groups, dim=1) for x in (keys, v))
        behind = (at[num - owed :, None] // length - at // length).clamp(max=2)
        scores = torch.full((self.heads[0], owed, num), -torch.inf, dtype=torch.float64)
        for distance in range(3):
            turned = (at % length + distance * length).clamp(max=farthest)
            q = rotated(raw_q, self.cos_sin, turned).to(dtype)[num - owed :]
            found = torch.einsum("qhd,khd->hqk", q.double(), keys) * self.scale
            scores = torch.where(behind == distance, found, scores)
        places = torch.arange(num)
        hidden = places > places[num - owed :, None]
        if (tree := self.tree(seq)) is not None:
            hidden[:, num - owed :] = ~tree[1]
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, v).flatten(1)


def world(
    kernels: AttentionKernels, shape: Shape, heads: tuple[int, int], kv_lens: list[int], chunks: DualChunks, **more: int
) -> DualWorld:
    w = DualWorld(attention(kernels), shape, heads, kv_lens, chunks=chunks, **more)
    w.cos_sin = cos_sin(chunks.num_undivided, w.rotary_dim or shape.head_dim)
    return w


def check(w: DualWorld, query_lens: list[int]) -> None:
    w.store_past(query_lens)
    out = w.step(query_lens).double()
    torch.testing.assert_close(out, w.want(query_lens), rtol=0, atol=ATOL[w.shape.dtype])


@pytest.mark.parametrize("heads", [(6, 2), (7, 1), (20, 1)], ids=str)
@pytest.mark.parametrize("chunks", CHUNKS, ids=str)
def test_ragged_batch(kernels: AttentionKernels, chunks: DualChunks, heads: tuple[int, int]) -> None:
    """Decodes, whole prompts, chunks of prompts and verifications at the borders of chunks; contexts that are split."""
    kv_lens = [1, 13, 26, 27, 49, 97, 145, 258, 20, 600]
    check(world(kernels, PLAIN, heads, kv_lens, chunks), [1, 1, 1, 27, 3, 50, 1, 5, 0, 1])


@pytest.mark.parametrize("heads", [(2, 2), (7, 1)], ids=str)
@pytest.mark.parametrize("chunks", CHUNKS[:3], ids=str)
def test_ragged_batch_without_tensor_cores(
    kernels: AttentionKernels, chunks: DualChunks, heads: tuple[int, int]
) -> None:
    check(world(kernels, SIMT, heads, [1, 17, 110, 300, 20], chunks), [1, 6, 30, 1, 0])


@pytest.mark.parametrize("shape", RELATED, ids=str)
@pytest.mark.parametrize("chunks", CHUNKS[:2], ids=str)
def test_rounded_keys(kernels: AttentionKernels, shape: Shape, chunks: DualChunks) -> None:
    """What scores lack for the origin differs with the query: here it is as large as in models."""
    w = world(kernels, shape, (4, 2), [1, 14, 60, 150, 97, 290], chunks, block_size=32)
    w.k = [k + torch.randn(shape.head_dim).to(k.dtype) for k in w.k]
    check(w, [1, 1, 60, 9, 3, 1])


@pytest.mark.parametrize("shape", [PLAIN, SIMT, RELATED[0]], ids=str)
@pytest.mark.parametrize("chunks", CHUNKS[:2], ids=str)
def test_trees(kernels: AttentionKernels, shape: Shape, chunks: DualChunks) -> None:
    """Rows of one draft lie in several chunks, by their depths."""
    trees = {1: [-1, 0, 0, 2, 1, 3], 2: [*range(-1, 15), -1, *range(16, 46)], 3: [-1, 0]}
    w = world(kernels, shape, (4, 2), [30, 150, 70, 16, 40], chunks)
    w.trees = trees
    check(w, [1, 7, 48, 3, 4])


@pytest.mark.parametrize("shape", [PLAIN, SIMT, RELATED[0], RELATED[3]], ids=str)
def test_results_are_those_of_the_torch_twin(kernels: AttentionKernels, shape: Shape) -> None:
    """A prompt in two parts, a verification across a border, a decode, of a rotary part of heads."""
    w = world(kernels, shape, (6, 2), [120, 70], CHUNKS[0], rotary_dim=32)
    twin = PagedAttention(torch.device("cpu"))
    (twin_kv,) = twin.allocate(w.spec, int(w.whole.block_tables.max()) + 1)
    for spans in ([(0, 40), (0, 30)], [(40, 94), (30, 31)], [(94, 99), (31, 69)], [(99, 100), (69, 70)]):
        batch = ragged([b - a for a, b in spans], [b for _, b in spans], 16)
        batch.block_tables = w.whole.block_tables
        slots = w.whole.slots.split(w.kv_lens)
        batch.slots = torch.cat([s[a:b] for s, (a, b) in zip(slots, spans, strict=True)])
        q, k, v = (torch.cat([x[a:b] for x, (a, b) in zip(xs, spans, strict=True)]) for xs in (w.q, w.k, w.v))
        want = twin.attend_dual_chunks(q, k, v, w.cos_sin, batch, twin_kv, w.scale, w.chunks)
        limit = 0.05 if shape.related else ATOL[shape.dtype]  # a key at the edge between two codes
        torch.testing.assert_close(w.attend(q, k, v, batch), want, rtol=0, atol=limit)


def test_within_what_is_undivided_it_is_attention_as_usual(kernels: AttentionKernels) -> None:
    chunks = DualChunks(200, 260)
    dual = world(kernels, PLAIN, (6, 2), [261, 90], chunks)
    usual = World(dual.attention, PLAIN, dual.heads, dual.kv_lens)
    torch.testing.assert_close(dual.step([261, 90]), usual.step([261, 90]), rtol=0, atol=ATOL[BF16])


def test_a_row_depends_neither_on_its_batch_nor_on_the_device(kernels: AttentionKernels) -> None:
    kv_lens, owed = [600, 270, 90, 500], [1, 3, 40, 9]
    w = world(kernels, PLAIN, (6, 1), kv_lens, CHUNKS[0])
    w.store_past(owed)
    parts, whole = w.step(owed).split(owed), w.owed(owed)
    w.attention = attention(kernels, num_sms=132)
    torch.testing.assert_close(w.step(owed).split(owed), parts, rtol=0, atol=0)
    for i, part in enumerate(parts):
        alone = ragged([owed[i]], [kv_lens[i]], 16)
        alone.block_tables, alone.slots = whole.block_tables[i : i + 1], whole.slots.split(owed)[i]
        q, k, v = (xs[i][-owed[i] :] for xs in (w.q, w.k, w.v))
        torch.testing.assert_close(w.attend(q, k, v, alone), part, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [PLAIN, RELATED[0]], ids=str)
def test_captured_decodes_replay_with_other_lengths(
    kernels: AttentionKernels, shape: Shape, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replay finds other lengths and positions than those it was captured with, and padding."""
    kept, partials, attend = [], attention_module._partials, attention_module.CudaAttention._attend

    def keep(attention: object, q: Tensor, *args: object) -> Tensor:
        kept.append((q, args))
        return attend(attention, q, *args)

    monkeypatch.setattr(attention_module, "_partials", lambda *args: kept.append(partials(*args)) or kept[-1])
    monkeypatch.setattr(attention_module.CudaAttention, "_attend", keep)
    w = world(kernels, shape, (4, 1), [600, 30, 290, 1], CHUNKS[0])
    w.store_past([1, 1, 1, 1])
    batch = w.owed([1, 1, 1, 1])
    batch.kv_lens = [1000] * 4
    batch.block_tables = torch.nn.functional.pad(batch.block_tables, (0, 63 - batch.block_tables.shape[1]))
    q, k, v = (w.last(xs, [1, 1, 1, 1]) for xs in (w.q, w.k, w.v))
    lens, slots, positions = batch.context_lens.clone(), batch.slots.clone(), batch.positions.clone()
    batch.context_lens.fill_(0), batch.slots.fill_(-1), batch.positions.fill_(0)  # as CUDA graphs are recorded
    w.attend(q, k, v, batch)
    cupy = kernels.launcher.cupy
    cupy.capture = launches = []
    try:
        out = w.attend(q, k, v, batch)
    finally:
        cupy.capture = None
    assert [launch.kernel.name.partition("<")[0] for launch in launches] == [
        "rope_and_store_dual",
        "paged_decode_dual",
        "merge_chunks",
    ]
    batch.context_lens.copy_(lens), batch.slots.copy_(slots), batch.positions.copy_(positions)
    batch.context_lens[3], batch.slots[3], batch.positions[3] = 0, -1, 0
    for launch in launches:
        launch.run()
    torch.testing.assert_close(out[:3].double(), w.want([1, 1, 1, 1])[:3], rtol=0, atol=ATOL[shape.dtype])
    assert not out[3].any()


def test_kernels_are_there_at_start_where_the_spec_says_so(kernels: AttentionKernels) -> None:
    kernels._others.clear()
    for dual in (False, True):
        spec = replace(kv_spec(PLAIN, 1, (8, 1), 16), trees=True, dual_chunks=dual)
        attention(kernels).allocate(spec, 1)
        assert ((PLAIN, DUAL) in kernels._others) == dual


def test_what_the_kernels_do_not_have_is_served_by_torch_or_refused(kernels: AttentionKernels) -> None:
    wide = replace(kv_spec(Shape(F16, None, 256), 1, (4, 2), 16), dual_chunks=True)
    (layer_kv,) = attention(kernels).allocate(wide, 1)
    assert not isinstance(layer_kv, LayerKV)
    w = world(kernels, PLAIN, (4, 2), [70], CHUNKS[1])
    with pytest.raises(ValueError, match="cos_sin has 26 positions, of 41"):
        w.attention.attend_dual_chunks(
            w.q[0], w.k[0], w.v[0], w.cos_sin, w.owed([70]), w.layer_kv, 1.0, DualChunks(30, 40)
        )
    tiny = replace(kv_spec(PLAIN, 1, (4, 2), 16), head_dim=8, dtype="float32")
    (other,) = w.attention.allocate(tiny, 6)
    q, k, v, angles = torch.randn(70, 4, 8), torch.randn(70, 2, 8), torch.randn(70, 2, 8), cos_sin(26, 8)
    twin = PagedAttention(torch.device("cpu"))
    (twin_kv,) = twin.allocate(tiny, 6)
    batch = ragged([70], [70], 16)
    want = twin.attend_dual_chunks(q, k, v, angles, batch, twin_kv, 0.3, CHUNKS[1])
    torch.testing.assert_close(w.attention.attend_dual_chunks(q, k, v, angles, batch, other, 0.3, CHUNKS[1]), want)
