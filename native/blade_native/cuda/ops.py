"""The CUDA op set: own kernels where they cover the tensors, torch's elsewhere."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable
from collections.abc import Sequence as Seq
from functools import partial
from typing import TYPE_CHECKING

import torch

from blade.nn import dequantize
from blade_native.cuda import packing
from blade_native.cuda.experts import GroupedExperts, PackedExperts, SortedExperts, are_plain
from blade_native.cuda.linear import DTYPES, DenseLinear, Device, LinearKernels, PackedLinear, are_alike
from blade_native.cuda.rows import RowKernels
from blade_native.cuda.selection import MAX_K, DeltaKernels, SelectKernels
from blade_native.reference import TorchOps

if TYPE_CHECKING:
    from torch import Tensor

    from blade import Batch, CaptureOptions, KVCache, QuantizedWeight
    from blade.contracts import Experts, Linear, Model
    from blade_native.cuda.launch import Launcher
    from blade_native.cuda.packing import Format, Packed

log = logging.getLogger("blade.native")


class CudaOps(TorchOps):
    """contracts.Ops over the kernels. `base` answers for the device's memory and the default dtype."""

    quantized_dtypes: Collection[torch.dtype] = DTYPES

    def __init__(self, base: TorchOps, launcher: Launcher) -> None:
        """Compiles the kernels that every model needs; raises what the compiler raises."""
        super().__init__(base.device)
        self.base = base
        self.launcher = launcher
        self.name = "cuda, own kernels"
        self._rows = RowKernels(launcher)
        device = properties(base.device)
        self.num_sms = device.num_sms
        self._linears = LinearKernels(launcher, device)
        self._refused: set[Format] = set()
        self._select: SelectKernels | None = None
        self._delta: dict[tuple[torch.dtype, int], DeltaKernels] = {}
        self._waits = False  # whether a layer was made that waits for the device

    def default_dtype(self) -> torch.dtype:
        return self.base.default_dtype()

    def available_memory(self) -> int:
        return self.base.available_memory()

    def to_device(self, x: Tensor) -> Tensor:
        return self.base.to_device(x)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if not self._rows.covers_norm(x, weight):
            return super().rms_norm(x, weight, eps)
        return self._rows.norm(x, weight, eps)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Works in place on residual."""
        if not self._rows.covers_add(x, residual, weight):
            return super().add_rms_norm(x, residual, weight, eps)
        return self._rows.add_norm(x, residual, weight, eps), residual

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        return self._rows.gate(gate_up) if self._rows.covers_gate(gate_up) else super().silu_mul(gate_up)

    def quantized_linear(self, weights: Seq[QuantizedWeight], bias: Tensor | None) -> Linear:
        """Kernels for what `packing.covers`; the others, and all of them where a kernel cannot be compiled or would
        meet NaN, become dense."""
        if all(map(packing.covers, weights)) and self._compiled(packing.format_of(weight) for weight in weights):
            try:
                return self._packed(packing.joined([packing.pack(weight, self.device) for weight in weights]), bias)
            except ValueError as error:
                log.warning("A linear becomes dense: %s.", error)
        weight = torch.cat([dequantize(weight, self._dtype) for weight in weights])
        return DenseLinear(self.to_device(weight), None if bias is None else self.to_device(bias))

    def _packed(self, parts: Seq[Packed], bias: Tensor | None) -> Linear:
        return PackedLinear(self._linears, parts, None if bias is None else self.to_device(bias), self._dtype)

    @property
    def _dtype(self) -> torch.dtype:
        """Of the activations that kernels for quantised weights are compiled for while loading."""
        return self.default_dtype() if self.default_dtype() in DTYPES else torch.bfloat16

    def _compiled(self, formats: Iterable[Format]) -> bool:
        """Whether the formats have their kernels; a warning says of one that cannot be compiled."""
        for chosen in formats:
            if chosen in self._refused:
                return False
            try:
                self._linears.get(chosen, self._dtype)
            except Exception as error:  # the compiler's and the driver's refusals have classes of their own
                log.warning("%s becomes dense: its kernel cannot be compiled: %s", chosen, str(error).strip())
                self._refused.add(chosen)
                return False
        return True

    def embedding_of(self, linear: Linear, dtype: torch.dtype) -> Callable[[Tensor], Tensor] | None:
        if isinstance(linear, PackedLinear):
            return partial(linear.rows, dtype=dtype) if len(linear.parts) == 1 else None
        return super().embedding_of(linear, dtype)

    def experts(self, gate_up: Seq[Linear], down: Seq[Linear]) -> Experts:
        if are_plain(gate_up) and are_plain(down):
            return GroupedExperts(self.silu_mul, gate_up, down)
        packed = [[linear for linear in linears if isinstance(linear, PackedLinear)] for linears in (gate_up, down)]
        if all(len(own) == len(down) and are_alike(own) for own in packed):
            return PackedExperts(self._linears, self.silu_mul, *packed)
        self._waits = True
        return SortedExperts(self.silu_mul, gate_up, down)

    def argmax(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        ids, values, log_sum = self.peaks(logits)
        return values + (log_sum - log_sum), ids  # not finite where the sum is not

    def peaks(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        select = self._selection()
        return select.peaks(logits) if select.covers(logits) else super().peaks(logits)

    def logprobs(self, logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        select = self._selection()
        if not select.covers(logits):
            return super().logprobs(logits, k)
        log_sums = select.peaks(logits)[2]
        values, ids = select.top_k(logits, k) if 1 <= k <= MAX_K else logits.topk(k)
        return log_sums, values - log_sums[:, None], ids

    def delta_step(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, slots: Tensor
    ) -> Tensor:
        if not DeltaKernels.covers(q, k, v, state):
            return super().delta_step(q, k, v, g, beta, state, slots)
        key = (q.dtype, q.shape[-1])
        if key not in self._delta:
            self._delta[key] = DeltaKernels(self.launcher, *key)
        return self._delta[key].step(q, k, v, g, beta, state, slots)

    def capture(self, model: Model, kv: KVCache, options: CaptureOptions) -> Callable[[Batch], Tensor]:
        """CUDA graphs of decode steps, recorded at once; only our own attention goes by the lengths on the device, as a
        replay has to. What waits for the device cannot be recorded."""
        from blade_native.cuda.attention import LayerKV
        from blade_native.cuda.graphs import CudaRecorder, GraphedForward

        if not options.enabled or not options.batch_sizes:
            return super().capture(model, kv, options)
        if self._waits:
            log.warning("Steps run kernel by kernel: which experts are chosen is asked for in each layer.")
            return super().capture(model, kv, options)
        if self.device.type != "cuda" or not all(isinstance(layer, LayerKV) for layer in kv):
            log.warning("Steps run kernel by kernel: the attention kernels do not cover this model's KV cache.")
            return super().capture(model, kv, options)
        return GraphedForward(model, kv, options, CudaRecorder(self.device), self.device)

    def _selection(self) -> SelectKernels:
        if self._select is None:
            self._select = SelectKernels(self.launcher)
        return self._select


def properties(device: torch.device) -> Device:
    """Of the device; an H100's where there is none to ask."""
    if device.type != "cuda":
        return Device()
    found = torch.cuda.get_device_properties(device)
    reserved = 1024 + 128  # of a block: the system's, and what kernels have beside what they are launched with
    return Device(found.multi_processor_count, found.shared_memory_per_multiprocessor - reserved)
