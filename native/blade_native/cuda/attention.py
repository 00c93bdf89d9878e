"""Paged attention on CUDA over our own kernels: contracts.Attention."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from blade import Batch, DualChunks, KVCache, KVSpec
from blade.contracts import Attention, DualChunkAttention, SlotAttention
from blade_native.cuda.attention_kernels import (
    DUAL,
    HADAMARD_WARPS,
    HEAD_DIMS,
    MERGE_WARPS,
    PLAIN,
    PREFILL_WARPS,
    SIMT_ROWS,
    SIMT_WARPS,
    SPLIT_ROWS,
    STORE_WARPS,
    TREES,
    Attending,
    AttentionKernels,
    Shape,
)
from blade_native.cuda.attention_plan import Plan, Split
from blade_native.cuda.launch import Kernel
from blade_native.kv_codes import MODES, block_bytes
from blade_native.simd.check import check, check_heads
from blade_native.slots import attend_slots

ALL, ORIGINS, REST = range(3)  # phases of kv_store.cu
LOG2E = 1.4426950408889634
BLOCK_SIZES = (16, 32, 64)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def shape_of(spec: KVSpec) -> Shape | None:
    """The kernels' shape for a spec; None where they do not cover it."""
    dtype: torch.dtype = getattr(torch, spec.dtype)
    covered = (
        dtype in DTYPES
        and spec.head_dim in HEAD_DIMS
        and spec.block_size in BLOCK_SIZES
        and spec.num_heads % spec.num_kv_heads == 0
        and spec.num_heads // spec.num_kv_heads <= SPLIT_ROWS
        and spec.storage in (None, *MODES)
        # Beside heads of 256 neither sums for middles nor what dual chunks take would fit into registers.
        and (spec.head_dim <= 128 or not (spec.storage == "int8_affine" or spec.dual_chunks))
        and not (spec.selected and spec.storage)  # torch gathers single tokens, and does not read what is rounded here
    )
    return Shape(dtype, spec.storage, spec.head_dim) if covered else None


def layer_block_bytes(spec: KVSpec, shape: Shape) -> int:
    """Of one layer, origins included."""
    if shape.numbers is not torch.float8_e4m3fn:
        return sum(block_bytes(spec))
    return (2 * spec.block_size + 1) * spec.num_kv_heads * spec.head_dim  # without scales


class LayerKV:
    """One layer's K and V as kv_storage.cuh has them, and the kernels for them.

    kv [num_blocks, 2, KV, block_size, D] of the shape's numbers, with int8 scales [num_blocks, 2, KV, block_size]
    float32; or pages [num_blocks, KV, bytes] uint8. Where keys are rounded origins [num_blocks, KV, D], int8 ones with
    origin_scales [num_blocks, KV] float32: see kv_store.cu.
    """

    def __init__(self, spec: KVSpec, shape: Shape, num_blocks: int, kernels: AttentionKernels) -> None:
        self.spec, self.shape = spec, shape
        self.group = spec.num_heads // spec.num_kv_heads
        self.kernels = kernels.get(shape)
        self.all_kernels = kernels
        for steps, wanted in ((TREES, spec.trees and not spec.dual_chunks), (DUAL, spec.dual_chunks)):
            if wanted:
                kernels.others(shape, steps)
        device, heads = kernels.launcher.device, (num_blocks, spec.num_kv_heads)
        rows = (num_blocks, 2, spec.num_kv_heads, spec.block_size)
        if shape.numbers is None:
            page_bytes = sum(block_bytes(spec)[:2]) // spec.num_kv_heads
            self.kv = torch.zeros((*heads, page_bytes), dtype=torch.uint8, device=device)
        else:
            num_bytes = spec.head_dim * shape.numbers.itemsize
            self.kv = torch.zeros((*rows, num_bytes), dtype=torch.uint8, device=device).view(shape.numbers)
        self.scales = torch.zeros(rows, device=device) if shape.numbers is torch.int8 else None
        origins = torch.zeros((*heads, spec.head_dim), dtype=torch.uint8, device=device) if shape.related else None
        self.origins = None if origins is None else origins.view(shape.origins)
        scaled = shape.related and shape.origins is torch.int8
        self.origin_scales = torch.zeros(heads, device=device) if scaled else None

    def gather_tokens(self, slots: Tensor, dtype: torch.dtype) -> Tensor:
        """slots [N] int64 -> [N, 2, KV, D], of keys and values that are not rounded."""
        return self.kv[slots // self.spec.block_size, :, :, slots % self.spec.block_size]

    def attending(self, steps: str) -> Attending:
        """But for those of usual steps they are compiled now where the spec did not announce them."""
        return self.kernels.attending if steps == PLAIN else self.all_kernels.others(self.shape, steps)


class CudaAttention:
    """Kernels for head dimensions 64, 80, 96, 128, 256 and blocks of 16, 32, 64 tokens; other shapes, and heads of 256
    in "int8_affine" or in dual chunks, are allocated and served by `base`. The cache is rounded to any of kv_codes.py's
    modes; "fp8_e4m3" has no scales here.

    A row's result depends neither on the batch beside it nor on the device. Nothing waits for the device. A captured
    step of decodes may be replayed with any lengths up to those it was captured with; a sequence of length 0 gets 0.
    Steps with trees of drafts, or in dual chunks, have kernels of their own, which other steps know nothing of.
    """

    chunked = trees = True
    kv_storages = tuple(MODES)

    def __init__(self, base: Attention, kernels: AttentionKernels, num_sms: int | None = None) -> None:
        """`num_sms`: multiprocessors to fill; the device's own by default."""
        self.base, self.kernels = base, kernels
        device = kernels.launcher.device
        self.num_sms = num_sms or torch.cuda.get_device_properties(device).multi_processor_count
        self._plan: Plan | None = None

    def block_bytes(self, spec: KVSpec) -> int:
        shape = shape_of(spec)
        return spec.num_layers * layer_block_bytes(spec, shape) if shape else self.base.block_bytes(spec)

    def allocate(self, spec: KVSpec, num_blocks: int) -> KVCache:
        """Compiles the kernels as well, or takes them from CuPy's cache."""
        shape = shape_of(spec)
        if shape is None:
            return self.base.allocate(spec, num_blocks)
        return [LayerKV(spec, shape, num_blocks, self.kernels) for _ in range(spec.num_layers)]

    def rope_and_store(
        self, q: Tensor, k: Tensor, v: Tensor, cos_sin: Tensor, batch: Batch, layer_kv: Any
    ) -> tuple[Tensor, Tensor]:
        """See contracts.Attention. q and k are rotated in place; a token with a negative slot is not stored. Where
        keys are rounded q comes as they are kept, which is for `attend` alone."""
        if not isinstance(layer_kv, LayerKV):
            return self.base.rope_and_store(q, k, v, cos_sin, batch, layer_kv)
        plan = self._plan_for(batch, layer_kv)
        arguments = _store_arguments(q, k, v, cos_sin, plan, layer_kv)
        _store(layer_kv.kernels.store, plan, layer_kv, layer_kv.spec.num_heads, arguments)
        return q, k

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
        """See contracts.Attention; `scale` is positive."""
        if not isinstance(layer_kv, LayerKV):
            return self.base.attend(q, k, v, batch, layer_kv, scale, window, chunk)
        plan, spec = self._plan_for(batch, layer_kv), layer_kv.spec
        _check_heads("q", q, layer_kv.shape.dtype, (plan.num_tokens, spec.num_heads, spec.head_dim))
        ancestors = batch.ancestors
        steps, more = (PLAIN, {}) if ancestors is None else (TREES, {"ancestors": ancestors})
        return self._attend(q, plan, layer_kv, scale, -chunk if chunk else window or 0, steps, more)

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
        """See contracts.DualChunkAttention; `scale` is positive. q and k stay as they are."""
        if not isinstance(layer_kv, LayerKV):
            base = cast("DualChunkAttention", self.base)
            return base.attend_dual_chunks(q, k, v, cos_sin, batch, layer_kv, scale, chunks)
        if len(cos_sin) < chunks.num_undivided:
            raise ValueError(f"cos_sin has {len(cos_sin)} positions, of {chunks.num_undivided}")
        plan, num_heads = self._plan_for(batch, layer_kv), layer_kv.spec.num_heads
        arguments = _store_arguments(q, k, v, cos_sin, plan, layer_kv, chunks.length)
        queries = q.new_empty((3, *q.shape))
        shifts = torch.empty(queries.shape[:3], device=q.device) if layer_kv.shape.related else None
        arguments |= {"queries": queries, "shifts": shifts, "farthest": chunks.farthest}
        _store(cast("Kernel", layer_kv.attending(DUAL).store), plan, layer_kv, 3 * num_heads, arguments)
        more = {
            "ancestors": batch.ancestors,
            "shifts": shifts,
            "behind": plan.num_tokens * num_heads,
            "length": chunks.length,
        }
        return self._attend(queries[0], plan, layer_kv, scale, 0, DUAL, more)

    def _attend(
        self, q: Tensor, plan: Plan, layer_kv: LayerKV, scale: float, reach: int, steps: str, more: dict[str, Any]
    ) -> Tensor:
        """`reach` as of AttentionArgs; `more`: what the kernels of such steps take beside its fields."""
        batch, spec = plan.batch, layer_kv.spec
        if scale <= 0:
            raise ValueError(f"scale {scale} is not positive")
        split = plan.split(abs(reach))
        out = q.new_empty((plan.num_tokens, spec.num_heads * spec.head_dim))
        partial_out, partial_sum = _partials(plan, split, spec, q.device)
        simt_rows = _simt_rows(plan, layer_kv.group)
        arguments = {
            "out": out,
            "q": q,
            "kv": layer_kv.kv,
            "scales": layer_kv.scales,
            "partial_out": partial_out,
            "partial_sum": partial_sum,
            "block_tables": batch.block_tables,
            "cu_seqlens": batch.cu_seqlens,
            "context_lens": batch.context_lens,
            "partial_starts": plan.partial_starts,
            "items": plan.items,
            "q_stride": q.stride(0),
            "table_stride": plan.table_stride,
            "num_kv_heads": spec.num_kv_heads,
            "group": layer_kv.group,
            "block_size": spec.block_size,
            "max_chunks": split.max_chunks,
            "reach": reach,
            "num_tiles": -(-plan.max_rows // simt_rows),
            "scale_log2": scale * LOG2E,
        }
        _launch(layer_kv.attending(steps), plan, layer_kv, split, simt_rows, arguments | more)
        if split.max_chunks > 1:
            grid = (-(-spec.num_heads // MERGE_WARPS), plan.num_seqs)
            layer_kv.kernels.merge(grid, (32 * MERGE_WARPS,), **arguments)
        if layer_kv.kernels.hadamard:
            num_heads = plan.num_tokens * spec.num_heads
            num_groups = -(-num_heads // HADAMARD_WARPS)
            layer_kv.kernels.hadamard((num_groups,), (32 * HADAMARD_WARPS,), x=out, num_heads=num_heads)
        return out

    def attend_slots(self, q: Tensor, batch: Batch, layer_kv: Any, scale: float, slots: Tensor) -> Tensor:
        """See contracts.SlotAttention; in torch."""
        if not isinstance(layer_kv, LayerKV):
            return cast("SlotAttention", self.base).attend_slots(q, batch, layer_kv, scale, slots)
        return attend_slots(q, slots, layer_kv.gather_tokens, scale)

    def _plan_for(self, batch: Batch, layer_kv: LayerKV) -> Plan:
        if self._plan is None or self._plan.batch is not batch or self._plan.group != layer_kv.group:
            self._plan = Plan(batch, layer_kv.group, layer_kv.spec.num_kv_heads, self.num_sms)
        return self._plan


def _store_arguments(
    q: Tensor, k: Tensor, v: Tensor, cos_sin: Tensor, plan: Plan, layer_kv: LayerKV, length: int = 0
) -> dict[str, Any]:
    """The fields of StoreArgs but for the phase; raises TypeError or ValueError for tensors that are not as they should
    be. `length`: positions of a dual chunk."""
    spec, batch, dtype = layer_kv.spec, plan.batch, layer_kv.shape.dtype
    _check_heads("q", q, dtype, (plan.num_tokens, spec.num_heads, spec.head_dim))
    _check_heads("k", k, dtype, (plan.num_tokens, spec.num_kv_heads, spec.head_dim))
    _check_heads("v", v, dtype, (plan.num_tokens, spec.num_kv_heads, spec.head_dim))
    rotary_dim = cos_sin.shape[-1]
    check("cos_sin", cos_sin, torch.float32, (cos_sin.shape[0], rotary_dim))
    if rotary_dim % 2 or rotary_dim > spec.head_dim:
        raise ValueError(f"rotary_dim {rotary_dim} does not fit head_dim {spec.head_dim}")
    return {
        "q": q,
        "k": k,
        "v": v,
        "kv": layer_kv.kv,
        "scales": layer_kv.scales,
        "origins": layer_kv.origins,
        "origin_scales": layer_kv.origin_scales,
        "cos_sin": cos_sin,
        "positions": batch.positions,
        "slots": batch.slots,
        "block_tables": batch.block_tables,
        "cu_seqlens": batch.cu_seqlens,
        "q_stride": q.stride(0),
        "k_stride": k.stride(0),
        "v_stride": v.stride(0),
        "num_heads": spec.num_heads,
        "num_kv_heads": spec.num_kv_heads,
        "rotary_dim": rotary_dim,
        "block_size": spec.block_size,
        "num_seqs": plan.num_seqs,
        "table_stride": plan.table_stride,
        "length": length,
    }


def _store(kernel: Kernel, plan: Plan, layer_kv: LayerKV, num_queries: int, arguments: dict[str, Any]) -> None:
    """`num_queries`: heads of a token's queries that are written."""
    grid = (plan.num_tokens, -(-(num_queries + 2 * layer_kv.spec.num_kv_heads) // STORE_WARPS))
    for phase in (ORIGINS, REST) if layer_kv.shape.related and plan.any_beginning else (ALL,):
        kernel(grid, (STORE_WARPS * 32,), phase=phase, **arguments)


def _launch(
    kernels: Attending, plan: Plan, layer_kv: LayerKV, split: Split, simt_rows: int, arguments: dict[str, Any]
) -> None:
    num_kv_heads = layer_kv.spec.num_kv_heads
    if kernels.decode and plan.any_short:
        block = (32 * layer_kv.shape.decode_ring[0],)
        kernels.decode((split.grid, num_kv_heads, plan.num_seqs), block, **arguments)
    if kernels.prefill and plan.num_items:
        grid = (plan.num_items, num_kv_heads, split.grid if plan.any_split_item else 1)
        kernels.prefill(grid, (32 * PREFILL_WARPS,), **arguments)
    if kernels.simt and plan.max_rows:
        grid = (plan.num_seqs * arguments["num_tiles"], num_kv_heads, split.grid)
        kernels.simt[simt_rows](grid, (32 * SIMT_WARPS,), **arguments)


def _simt_rows(plan: Plan, group: int) -> int:
    return next((rows for rows in SIMT_ROWS if group <= rows), SIMT_ROWS[-1])


def _partials(plan: Plan, split: Split, spec: KVSpec, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """Room for the chunks' results. Taken anew for each layer: under capture it belongs to the graph."""
    if split.max_chunks == 1:
        return None, None
    num_rows = plan.num_split_tokens * spec.num_heads * split.max_chunks
    both = torch.empty(num_rows * (spec.head_dim + 2), dtype=torch.float32, device=device)
    return both[: num_rows * spec.head_dim], both[num_rows * spec.head_dim :]


def _check_heads(name: str, x: Tensor, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    check_heads(name, x, dtype, shape)
    if x.data_ptr() % 16 or (x.stride(0) * x.itemsize % 16 and len(x) > 1):
        raise ValueError(f"{name}: a token does not start at a multiple of 16 bytes")
