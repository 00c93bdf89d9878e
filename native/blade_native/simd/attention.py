"""Paged attention over the compiled kernels: contracts.Attention."""

from __future__ import annotations

import ctypes
from typing import Any, cast

import torch
from torch import Tensor

from blade import Batch, DualChunks, KVCache, KVSpec
from blade.contracts import Attention, DualChunkAttention, SlotAttention
from blade_native.kv_codes import MODES, Kept, block_bytes, mode_of
from blade_native.simd.check import DTYPES, check, check_heads
from blade_native.simd.library import CKept, CPagedKV, CStep, Library
from blade_native.simd.memory import allocate

MAX_HEAD_DIM = 256
CODES = {(8, None): 2, (4, None): 4, (8, torch.float8_e4m3fn): 5, (8, torch.float8_e5m2): 6}  # `Dtype` of api.h


class LayerKV:
    """One layer's K and V in the kernels' layout (kv_chunk.h), on huge pages."""

    def __init__(self, spec: KVSpec, num_blocks: int) -> None:
        self.dtype: torch.dtype = getattr(torch, spec.dtype)
        self.num_heads, self.num_kv_heads, self.head_dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
        self.k, self.v, self.origins = (allocate(num_blocks * num_bytes) for num_bytes in block_bytes(spec))
        keys, values = mode_of(spec) or (None, None)
        self._struct = CPagedKV(
            DTYPES[self.dtype],
            spec.num_heads,
            spec.num_kv_heads,
            spec.head_dim,
            spec.block_size,
            _kept(keys, spec),
            _kept(values, spec),
            self.k.data_ptr(),
            self.v.data_ptr(),
            self.origins.data_ptr(),
        )
        self.address = ctypes.addressof(self._struct)


def _kept(kept: Kept | None, spec: KVSpec) -> CKept:
    if kept is None:
        return CKept(DTYPES[getattr(torch, spec.dtype)], spec.head_dim, 0)
    return CKept(CODES[kept.bits, kept.floats], kept.group_of(spec.head_dim), kept.affine)


def covers(spec: KVSpec) -> bool:
    """Whether the kernels have this shape: float32 or bfloat16, head_dim 16, 32, ... 256, block size 16, 32, ..., kept
    in dtype or rounded."""
    return (
        getattr(torch, spec.dtype) in DTYPES
        and spec.head_dim % 16 == 0
        and spec.head_dim <= MAX_HEAD_DIM
        and spec.block_size % 16 == 0
        and spec.num_heads % spec.num_kv_heads == 0
        and spec.storage in (None, *MODES)
    )


class StepArguments:
    """What the layers of one step pass to the kernels alike, checked once: `Step` of api.h."""

    def __init__(self, batch: Batch) -> None:
        self._struct = CStep()
        self.address = ctypes.addressof(self._struct)
        self.update(batch)

    def update(self, batch: Batch) -> None:
        """Another step in the same place."""
        num_tokens, num_seqs = len(batch.positions), len(batch.context_lens)
        max_blocks = batch.block_tables.shape[-1]
        check("positions", batch.positions, torch.int64, (num_tokens,))
        check("slots", batch.slots, torch.int64, (num_tokens,))
        check("cu_seqlens", batch.cu_seqlens, torch.int32, (num_seqs + 1,))
        check("context_lens", batch.context_lens, torch.int32, (num_seqs,))
        check("block_tables", batch.block_tables, torch.int32, (num_seqs, max_blocks))
        if batch.ancestors is not None:
            check("ancestors", batch.ancestors, torch.int64, (num_tokens,))
        self.batch, self.num_tokens = batch, num_tokens
        self._struct.__init__(  # type: ignore[misc]
            batch.positions.data_ptr(),
            batch.slots.data_ptr(),
            batch.cu_seqlens.data_ptr(),
            batch.context_lens.data_ptr(),
            batch.block_tables.data_ptr(),
            None if batch.ancestors is None else batch.ancestors.data_ptr(),
            num_tokens,
            num_seqs,
            max_blocks,
        )


class SimdAttention:
    """A row's result depends neither on the batch around it nor on the number of threads.

    Caches of a shape that the kernels do not cover are allocated and served by `base`.
    """

    kv_storages = tuple(MODES)
    chunked = trees = True

    def __init__(self, base: Attention, library: Library, threads: int) -> None:
        self.base = base
        self.library = library
        self.threads = threads
        self._step: StepArguments | None = None

    def block_bytes(self, spec: KVSpec) -> int:
        return spec.num_layers * sum(block_bytes(spec)) if covers(spec) else self.base.block_bytes(spec)

    def allocate(self, spec: KVSpec, num_blocks: int) -> KVCache:
        if not covers(spec):
            return self.base.allocate(spec, num_blocks)
        return [LayerKV(spec, num_blocks) for _ in range(spec.num_layers)]

    def rope_and_store(
        self, q: Tensor, k: Tensor, v: Tensor, cos_sin: Tensor, batch: Batch, layer_kv: Any
    ) -> tuple[Tensor, Tensor]:
        if not isinstance(layer_kv, LayerKV):
            return self.base.rope_and_store(q, k, v, cos_sin, batch, layer_kv)
        rotated_q = q.new_empty(q.shape)
        return rotated_q, self._rope_and_store(q, k, v, cos_sin, batch, layer_kv, rotated_q)

    def _rope_and_store(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos_sin: Tensor,
        batch: Batch,
        layer_kv: LayerKV,
        rotated_q: Tensor,
        chunks: DualChunks | None = None,
    ) -> Tensor:
        """The rotated k. rotated_q [T, H, D] is filled, with chunks [3, T, H, D]."""
        step, dtype = self._arguments(batch), layer_kv.dtype
        q_shape = (step.num_tokens, layer_kv.num_heads, layer_kv.head_dim)
        kv_shape = (step.num_tokens, layer_kv.num_kv_heads, layer_kv.head_dim)
        check_heads("q", q, dtype, q_shape)
        check_heads("k", k, dtype, kv_shape)
        check_heads("v", v, dtype, kv_shape)
        rotary_dim = cos_sin.shape[-1]
        check("cos_sin", cos_sin, torch.float32, (cos_sin.shape[0], rotary_dim))
        if rotary_dim % 2 or rotary_dim > layer_kv.head_dim:
            raise ValueError(f"rotary_dim {rotary_dim} does not fit head_dim {layer_kv.head_dim}")
        rotated_k = k.new_empty(kv_shape)
        tensors = q.data_ptr(), k.data_ptr(), v.data_ptr(), q.stride(0), k.stride(0), v.stride(0)
        table = cos_sin.data_ptr(), rotary_dim
        outputs = rotated_q.data_ptr(), rotated_k.data_ptr()
        where = layer_kv.address, step.address
        self.library.rope_and_store(*where, *tensors, *table, *outputs, *(chunks or (0, 0)), self.threads)
        return rotated_k

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        batch: Batch,
        layer_kv: Any,
        scale: float,
        window: int | None,
        chunk: int | None = None,
    ) -> Tensor:
        if not isinstance(layer_kv, LayerKV):
            return self.base.attend(q, k, v, batch, layer_kv, scale, window, chunk)
        num_tokens, num_heads, head_dim = self._arguments(batch).num_tokens, layer_kv.num_heads, layer_kv.head_dim
        check_heads("q", q, layer_kv.dtype, (num_tokens, num_heads, head_dim))
        return self._attend(q, batch, layer_kv, scale, -chunk if chunk else window or 0)

    def attend_dual_chunks(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos_sin: Tensor,
        batch: Batch,
        layer_kv: Any,
        scale: float,
        chunks: DualChunks,
    ) -> Tensor:
        """See contracts.DualChunkAttention."""
        if not isinstance(layer_kv, LayerKV):
            base = cast("DualChunkAttention", self.base)
            return base.attend_dual_chunks(q, k, v, cos_sin, batch, layer_kv, scale, chunks)
        if len(cos_sin) < chunks.num_undivided:
            raise ValueError(f"cos_sin has {len(cos_sin)} positions, of {chunks.num_undivided}")
        queries = q.new_empty((3, *q.shape))
        self._rope_and_store(q, k, v, cos_sin, batch, layer_kv, queries, chunks)
        return self._attend(queries[0], batch, layer_kv, scale, -chunks.length, queries.stride(0))

    def attend_slots(self, q: Tensor, batch: Batch, layer_kv: Any, scale: float, slots: Tensor) -> Tensor:
        """See contracts.SlotAttention. What a query gets that sees all keys before it is what `attend` gives, to the
        last bit."""
        if not isinstance(layer_kv, LayerKV):
            return cast("SlotAttention", self.base).attend_slots(q, batch, layer_kv, scale, slots)
        num_tokens, width = len(q), slots.shape[1]
        check_heads("q", q, layer_kv.dtype, (num_tokens, layer_kv.num_heads, layer_kv.head_dim))
        check("slots", slots, torch.int32, (num_tokens, width))
        out = q.new_empty((num_tokens, layer_kv.num_heads * layer_kv.head_dim))
        queries, chosen = (q.data_ptr(), q.stride(0)), (slots.data_ptr(), num_tokens, width)
        self.library.attend_slots(layer_kv.address, *queries, scale, *chosen, out.data_ptr(), self.threads)
        return out

    def _attend(
        self, q: Tensor, batch: Batch, layer_kv: LayerKV, scale: float, reach: int, q_behind: int = 0
    ) -> Tensor:
        """q [T, H, D], checked; `reach` and `q_behind` are `window` and `q_behind` of AttendCall."""
        step = self._arguments(batch)
        out = q.new_empty((step.num_tokens, layer_kv.num_heads * layer_kv.head_dim))
        queries = q.data_ptr(), q.stride(0)
        where = layer_kv.address, step.address
        self.library.attend(*where, *queries, scale, reach, out.data_ptr(), q_behind, self.threads)
        return out

    def _arguments(self, batch: Batch) -> StepArguments:
        if self._step is None or self._step.batch is not batch:
            self._step = StepArguments(batch)
            if self.library.recording.tape is not None:
                self.library.recording.steps.append(self._step)
        return self._step
