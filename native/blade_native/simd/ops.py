"""The op set: contracts.Ops over the compiled kernels. What they do not cover (float16) goes to the torch op set."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from collections.abc import Sequence as Seq
from functools import partial

import torch
from torch import Tensor

from blade import Batch, CaptureOptions, Float8Weight, GGMLBlocks, GroupedWeight, KeySelection, KVCache, QuantizedWeight
from blade.contracts import Experts, Linear, Model, Ops
from blade.nn import DefaultOps, dequantize
from blade_native.host import keep_freed_memory
from blade_native.simd.blocks import KINDS, pack_blocks
from blade_native.simd.capture import CapturedForward
from blade_native.simd.check import DTYPES, check, check_heads, check_rows
from blade_native.simd.experts import packed_experts
from blade_native.simd.indexer import Indexer, covers
from blade_native.simd.library import Library
from blade_native.simd.limits import read_bandwidth
from blade_native.simd.linear import PackedLinear, pack_dense
from blade_native.simd.quantized import DequantizedLinear, has_kernel, pack_quantized, problem
from blade_native.simd.recurrence import LANES, WINDOWS, Recurrence
from blade_native.simd.rounding import round_weight

log = logging.getLogger("blade.native")


class SimdOps(DefaultOps):
    """bf16 and f32 on a CPU. `base` answers for the memory and for float16."""

    quantized_dtypes: Collection[torch.dtype] = tuple(DTYPES)

    def __init__(self, base: Ops, library: Library, threads: int | None = None) -> None:
        self.base = base
        self.library = library
        self.threads = threads or torch.get_num_threads()
        self._recurrence = Recurrence(library, self.threads)
        self._indexer = Indexer(library, self.threads)
        self.device = base.device
        self.name = f"cpu, {self.threads} threads, {library.level} kernels"

    def default_dtype(self) -> torch.dtype:
        return torch.bfloat16

    def available_memory(self) -> int:
        return self.base.available_memory() + self.library.regions.idle_bytes

    def memory_bandwidth(self, num_bytes: int | None = None) -> float:
        return read_bandwidth(self.library, self.threads, num_bytes=num_bytes)

    def to_device(self, x: Tensor) -> Tensor:
        return self.base.to_device(x)

    def linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        if weight.dtype not in DTYPES:
            return self.base.linear(weight, bias)
        return pack_dense(self.library, weight, bias, self.threads)

    def quantized_linear(self, weights: QuantizedWeight | Seq[QuantizedWeight], bias: Tensor | None) -> Linear:
        """Linears over quantised matrices stacked along N, each in its own format, or over one; bias [sum of N]. What
        no kernel computes on becomes dense. Raises ValueError naming the field that is not as it should be."""
        several = [weights] if isinstance(weights, GroupedWeight | Float8Weight) else weights
        for weight in several:
            if reason := problem(weight):
                raise ValueError(reason)
        if all(has_kernel(weight) for weight in several):
            return pack_quantized(self.library, several, bias, self.threads)
        log.warning("A linear becomes dense: the kernels do not compute on its format.")
        dtype = self.default_dtype()
        return DequantizedLinear(self.linear(torch.cat([dequantize(weight, dtype) for weight in several]), bias), dtype)

    def round_weight(self, weight: Tensor, bits: int, group: int) -> GroupedWeight | None:
        return round_weight(self.library, weight, bits, group, self.threads)

    def blocks_linear(self, blocks: Seq[GGMLBlocks], bias: Tensor | None) -> Linear | None:
        if any(each.kind not in KINDS for each in blocks):
            return None
        return pack_blocks(self.library, blocks, bias, self.threads)

    def experts(self, gate_up: Seq[Linear], down: Seq[Linear]) -> Experts:
        """Packed linears in one call, of whatever formats; others expert by expert."""
        packed = packed_experts(self.library, gate_up, down, self.threads)
        return super().experts(gate_up, down) if packed is None else packed

    def embedding(self, weight: Tensor) -> Callable[[Tensor], Tensor]:
        return partial(self.take_rows, weight.contiguous())

    def embedding_of(self, linear: Linear, dtype: torch.dtype) -> Callable[[Tensor], Tensor] | None:
        if isinstance(linear, PackedLinear):
            return partial(linear.rows, dtype=dtype) if dtype in (linear.dtype or dtype, *DTYPES) else None
        return self.base.embedding_of(linear, dtype)

    def take_rows(self, x: Tensor, rows: Tensor) -> Tensor:
        """x [N, D] of any dtype; rows are trusted to be in range."""
        check("x", x, x.dtype, (x.shape[0], x.shape[-1]))
        check("rows", rows, torch.int64, (rows.numel(),))
        out = x.new_empty((rows.numel(), x.shape[1]))
        row_bytes = x.shape[1] * x.itemsize
        self.library.take_rows(x.data_ptr(), rows.data_ptr(), rows.numel(), row_bytes, out.data_ptr(), self.threads)
        return out

    def scale_rows(self, x: Tensor, factors: Tensor, rows: Tensor) -> Tensor:
        """Rows are trusted to be in range."""
        if x.dtype not in DTYPES:
            return super().scale_rows(x, factors, rows)
        num_tokens, num_heads, head_dim = x.shape
        check_heads("x", x, x.dtype, (num_tokens, num_heads, head_dim))
        check("factors", factors, torch.float32, (factors.numel(),))
        check("rows", rows, torch.int64, (num_tokens,))
        y = x.new_empty(x.shape)
        where = x.data_ptr(), num_tokens, num_heads * head_dim, x.stride(0), factors.data_ptr(), rows.data_ptr()
        self.library.scale_rows(DTYPES[x.dtype], *where, y.data_ptr(), self.threads)
        return y

    def copy_rows(self, x: Tensor, out: Tensor) -> None:
        """x and out [N, D] of any dtype."""
        check_rows("x", x, out.dtype, out.shape)
        check_rows("out", out, out.dtype, out.shape)
        size = x.itemsize
        self.library.copy_rows(
            x.data_ptr(), len(x), x.shape[1] * size, x.stride(0) * size, out.data_ptr(), out.stride(0) * size,
            self.threads,
        )  # fmt: skip

    def add_rows(self, y: Tensor, rows: Tensor | None, x: Tensor) -> None:
        if y.dtype not in DTYPES:
            super().add_rows(y, rows, x)
            return
        num_rows, d = x.shape
        check("x", x, y.dtype, (len(y) if rows is None else rows.numel(), y.shape[1]))
        check("y", y, y.dtype, y.shape)
        if rows is not None:
            check("rows", rows, torch.int64, (num_rows,))
        at = None if rows is None else rows.data_ptr()
        self.library.add_rows(DTYPES[y.dtype], x.data_ptr(), at, num_rows, d, y.data_ptr(), self.threads)

    def capture(self, model: Model, kv: KVCache, options: CaptureOptions) -> Callable[[Batch], Tensor]:
        """Small steps are replayed, see capture.py. By now the weights are there: what they have left is given back."""
        self.library.regions.close()
        keep_freed_memory()

        def forward(batch: Batch) -> Tensor:
            return model.forward(batch, kv)

        return CapturedForward(forward, self.library) if options.enabled else forward

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x [..., D]; of three or more axes the first may be strided, as in a slice of a fused projection."""
        if x.dtype not in DTYPES:
            return self.base.rms_norm(x, weight, eps)
        d = x.shape[-1]
        check("weight", weight, x.dtype, (d,))
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        outer, inner, stride = rows_of(x, d)
        self.library.rms_norm(
            DTYPES[x.dtype], x.data_ptr(), outer, inner, stride, d, weight.data_ptr(), eps, y.data_ptr(), self.threads
        )
        return y

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """x and residual [..., D], weight [D]; works in place on residual."""
        if x.dtype not in DTYPES:
            return self.base.add_rms_norm(x, residual, weight, eps)
        d = x.shape[-1]
        check("x", x, x.dtype, x.shape)
        check("residual", residual, x.dtype, x.shape)
        check("weight", weight, x.dtype, (d,))
        y = torch.empty_like(x)
        self.library.add_rms_norm(
            DTYPES[x.dtype],
            x.data_ptr(),
            residual.data_ptr(),
            x.numel() // d,
            d,
            weight.data_ptr(),
            eps,
            y.data_ptr(),
            self.threads,
        )
        return y, residual

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        if gate_up.dtype not in DTYPES:
            return self.base.silu_mul(gate_up)
        rows, width = gate_up.shape
        check("gate_up", gate_up, gate_up.dtype, (rows, width))
        if width % 2:
            raise ValueError(f"gate_up has an odd width, {width}")
        y = gate_up.new_empty((rows, width // 2))
        self.library.silu_mul(DTYPES[gate_up.dtype], gate_up.data_ptr(), rows, width // 2, y.data_ptr(), self.threads)
        return y

    def sigmoid_mul(self, x: Tensor, gate: Tensor) -> Tensor:
        """x [T, D], changed in place; gate [T, D] or [T, 1], whose rows may lie apart."""
        if x.dtype not in DTYPES:
            return super().sigmoid_mul(x, gate)
        rows, d = x.shape
        check("x", x, x.dtype, (rows, d))
        width = gate.shape[-1]
        if gate.dtype is not x.dtype or gate.shape not in ((rows, d), (rows, 1)) or (width > 1 and gate.stride(1) != 1):
            raise ValueError(f"gate is {gate.dtype} {list(gate.shape)}, not {x.dtype} [{rows}, {d}] or [{rows}, 1]")
        where = x.data_ptr(), gate.data_ptr()
        self.library.sigmoid_mul(DTYPES[x.dtype], *where, rows, d, width, gate.stride(0), self.threads)
        return x

    def route(self, logits: Tensor, k: int, normalize: bool, sigmoid: bool = False) -> tuple[Tensor, Tensor]:
        """Of a row with NaN or +infinity the weights are NaN and the ids any in range."""
        if logits.dtype not in DTYPES:
            return super().route(logits, k, normalize, sigmoid)
        rows, num_experts = logits.shape
        check("logits", logits, logits.dtype, (rows, num_experts))
        if not 1 <= k <= num_experts:
            raise ValueError(f"k = {k} is not in 1..{num_experts}")
        ids = logits.new_empty((rows, k), dtype=torch.int64)
        weights = logits.new_empty((rows, k), dtype=torch.float32)
        into = ids.data_ptr(), weights.data_ptr()
        dtype, how = DTYPES[logits.dtype], (normalize, sigmoid)
        self.library.route(dtype, logits.data_ptr(), rows, num_experts, k, *how, *into, self.threads)
        return ids, weights

    def short_conv(self, x: Tensor, weight: Tensor, batch: Batch, state: Tensor) -> Tensor:
        if x.dtype not in DTYPES or weight.shape[1] not in WINDOWS:
            return super().short_conv(x, weight, batch, state)
        return self._recurrence.short_conv(x, weight, batch, state)

    def gated_delta(
        self, q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, decay: Tensor, dt_bias: Tensor, batch: Batch,
        state: Tensor,
    ) -> Tensor:  # fmt: skip
        if v.dtype not in DTYPES or v.shape[2] % LANES:
            return super().gated_delta(q, k, v, a, b, decay, dt_bias, batch, state)
        return self._recurrence.gated_delta(q, k, v, a, b, decay, dt_bias, batch, state)

    def gated_rms_norm(self, x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
        if x.dtype not in DTYPES:
            return super().gated_rms_norm(x, gate, weight, eps)
        return self._recurrence.gated_rms_norm(x, gate, weight, eps)

    def keep_index_keys(
        self, k: Tensor, weight: Tensor, eps: float, cos_sin: Tensor, batch: Batch, kept: Tensor, group: int
    ) -> None:
        keep = self._indexer.keep_index_keys if covers(kept) else super().keep_index_keys
        keep(k, weight, eps, cos_sin, batch, kept, group)

    def select_keys(self, q: Tensor, cos_sin: Tensor, batch: Batch, kept: Tensor, selection: KeySelection) -> Tensor:
        select = self._indexer.select_keys if covers(kept) else super().select_keys
        return select(q, cos_sin, batch, kept, selection)

    def argmax(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        check("logits", logits, torch.float32, (logits.shape[0], logits.shape[-1]))
        values, ids = torch.empty(len(logits)), torch.empty(len(logits), dtype=torch.int64)
        self.library.argmax(logits.data_ptr(), *logits.shape, values.data_ptr(), ids.data_ptr(), self.threads)
        return values, ids

    def draw(
        self, logits: Tensor, temperatures: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, u: Tensor
    ) -> tuple[Tensor, Tensor]:
        rows, vocab_size = logits.shape
        check("logits", logits, torch.float32, (rows, vocab_size))
        check("temperatures", temperatures, torch.float32, (rows,))
        check("top_k", top_k, torch.int64, (rows,))
        check("top_p", top_p, torch.float64, (rows,))
        check("min_p", min_p, torch.float32, (rows,))
        check("u", u, torch.float64, (rows,))
        peaks, ids = torch.empty(rows), torch.empty(rows, dtype=torch.int64)
        self.library.draw(
            logits.data_ptr(), rows, vocab_size, temperatures.data_ptr(), top_k.data_ptr(), top_p.data_ptr(),
            min_p.data_ptr(), u.data_ptr(), peaks.data_ptr(), ids.data_ptr(), self.threads,
        )  # fmt: skip
        return peaks, ids

    def logprobs(self, logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Equal ones by id."""
        rows, vocab_size = logits.shape
        check("logits", logits, torch.float32, (rows, vocab_size))
        if not 0 <= k <= vocab_size:
            raise ValueError(f"k = {k} is not in 0..{vocab_size}")
        log_sums, logprobs, ids = torch.empty(rows), torch.empty(rows, k), torch.empty(rows, k, dtype=torch.int64)
        into = log_sums.data_ptr(), logprobs.data_ptr(), ids.data_ptr()
        self.library.logprobs(logits.data_ptr(), rows, vocab_size, k, *into, self.threads)
        return log_sums, logprobs, ids


def rows_of(x: Tensor, d: int) -> tuple[int, int, int]:
    """x [..., D] as (outer, inner, stride): `inner` contiguous rows of D, `outer` times `stride` elements apart."""
    if x.is_contiguous():
        return (x.numel() // d, 1, d)
    if x.dim() > 1 and x[0].is_contiguous():
        return x.shape[0], x[0].numel() // d, x.stride(0)
    raise ValueError("x: the rows behind one index do not lie side by side")
