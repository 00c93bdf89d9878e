"""What an op set need not write: ops that can be made of others, in plain torch, and the answers of a device without
kernels of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from blade.nn import default_recurrence, default_selection

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from collections.abc import Sequence as Seq

    from torch import Tensor

    from blade.contracts import Experts, Linear, Model
    from blade.types import Batch, CaptureOptions, GGMLBlocks, GroupedWeight, KeySelection, KVCache, QuantizedWeight


class DefaultOps:
    """The part of contracts.Ops that a device may inherit; what the contract gains has its default here."""

    silu_mul: Callable[[Tensor], Tensor]
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    quantized_dtypes: Collection[torch.dtype] = ()

    def memory_bandwidth(self, num_bytes: int | None = None) -> float | None:
        """None: unknown."""
        return None

    def quantized_linear(self, weights: Seq[QuantizedWeight], bias: Tensor | None) -> Linear:
        """Never called while quantized_dtypes is empty."""
        raise TypeError("this op set has no kernels for quantised weights")

    def blocks_linear(self, blocks: Seq[GGMLBlocks], bias: Tensor | None) -> Linear | None:
        """None: blocks are unpacked into grouped weights."""
        return None

    def round_weight(self, weight: Tensor, bits: int, group: int) -> GroupedWeight | None:
        """None: in torch."""
        return None

    def embedding_of(self, linear: Linear, dtype: torch.dtype) -> Callable[[Tensor], Tensor] | None:
        """None: a tied embedding is loaded by itself."""
        return None

    def capture(self, model: Model, kv: KVCache, options: CaptureOptions) -> Callable[[Batch], Tensor]:
        """The forward as it is."""
        return lambda batch: model.forward(batch, kv)

    def take_rows(self, x: Tensor, rows: Tensor) -> Tensor:
        return x.index_select(0, rows)

    def scale_rows(self, x: Tensor, factors: Tensor, rows: Tensor) -> Tensor:
        return (x * factors[rows][:, None, None]).to(x.dtype)

    def copy_rows(self, x: Tensor, out: Tensor) -> None:
        out.copy_(x)

    def add_rows(self, y: Tensor, rows: Tensor | None, x: Tensor) -> None:
        if rows is None:
            y.add_(x)
        else:
            y.index_add_(0, rows, x)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        residual.add_(x)
        return self.rms_norm(residual, weight, eps), residual

    def experts(self, gate_up: Seq[Linear], down: Seq[Linear]) -> Experts:
        return MixedExperts(self.silu_mul, gate_up, down)

    def sigmoid_mul(self, x: Tensor, gate: Tensor) -> Tensor:
        return torch.sigmoid(gate).mul(x)

    def route(self, logits: Tensor, k: int, normalize: bool, sigmoid: bool = False) -> tuple[Tensor, Tensor]:
        logits = logits.float()
        ids = torch.sort(logits, dim=-1, descending=True, stable=True).indices[:, :k]
        weights = (logits.sigmoid() if sigmoid else logits.softmax(-1)).gather(1, ids)
        return ids, weights / weights.sum(-1, keepdim=True) if normalize else weights

    def short_conv(self, x: Tensor, weight: Tensor, batch: Batch, state: Tensor) -> Tensor:
        return default_recurrence.short_conv(x, weight, batch, state)

    def gated_delta(
        self, q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, decay: Tensor, dt_bias: Tensor, batch: Batch,
        state: Tensor,
    ) -> Tensor:  # fmt: skip
        return default_recurrence.gated_delta(q, k, v, a, b, decay, dt_bias, batch, state)

    def gated_rms_norm(self, x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
        return default_recurrence.gated_rms_norm(x, gate, weight, eps)

    def keep_index_keys(
        self, k: Tensor, weight: Tensor, eps: float, cos_sin: Tensor, batch: Batch, kept: Tensor, group: int
    ) -> None:
        default_selection.keep_index_keys(k, weight, eps, cos_sin, batch, kept, group)

    def select_keys(self, q: Tensor, cos_sin: Tensor, batch: Batch, kept: Tensor, selection: KeySelection) -> Tensor:
        return default_selection.select_keys(q, cos_sin, batch, kept, selection)

    def draw(
        self, logits: Tensor, temperatures: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, u: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        """None: in torch."""
        return None

    def logprobs(self, logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        log_sums = logits.logsumexp(-1)
        values, ids = logits.topk(k)
        return log_sums, values - log_sums[:, None], ids


class MixedExperts:
    """contracts.Experts: expert by expert, each on the rows that chose it."""

    def __init__(self, silu_mul: Callable[[Tensor], Tensor], gate_up: Seq[Linear], down: Seq[Linear]) -> None:
        self.silu_mul, self.gate_up, self.down = silu_mul, gate_up, down

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor, weigh_input: bool = False) -> Tensor:
        out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for expert in torch.unique(ids).tolist():
            rows, places = (ids == expert).nonzero(as_tuple=True)
            inner, shares = x[rows], weights[rows, places, None]
            inner = inner * shares.to(x.dtype) if weigh_input else inner
            y = self.down[expert](self.silu_mul(self.gate_up[expert](inner)), torch.float32)
            out.index_add_(0, rows, y if weigh_input else y * shares)
        return out.to(x.dtype)
