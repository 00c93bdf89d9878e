"""A mixture of experts on CUDA: in two grouped products where the experts are plain, else expert by expert."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from blade_native.cuda.linear import PackedLinear, StackedLinear
from blade_native.reference import TorchLinear

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence as Seq

    from torch import Tensor

    from blade.contracts import Linear
    from blade_native.cuda.linear import LinearKernels

ROW_BYTES = 16  # that rows of a grouped product's matrices are multiples of


def are_plain(linears: Seq[Linear]) -> bool:
    """Whether a grouped product covers them: plain matrices of one shape in bfloat16."""
    weights = [linear.weight for linear in linears if type(linear) is TorchLinear and linear.bias is None]
    return len(weights) == len(linears) and all(
        weight.dtype == torch.bfloat16 and weight.shape == weights[0].shape and weight.shape[1] * 2 % ROW_BYTES == 0
        for weight in weights
    )


class GroupedExperts:
    """contracts.Experts over plain matrices: where each expert's tokens begin stays on the device, so that nothing is
    waited for and steps can be captured. A token's results are summed in the order of its `ids`."""

    def __init__(self, silu_mul: Callable[[Tensor], Tensor], gate_up: Seq[Linear], down: Seq[Linear]) -> None:
        self.silu_mul = silu_mul
        self.gate_up, self.down = stacked(gate_up), stacked(down)
        self.experts = torch.arange(len(down), device=self.down.device)

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor, weigh_input: bool = False) -> Tensor:
        """`weigh_input`: weights are for what goes into the experts, and are rounded to x's dtype."""
        chosen, order = torch.sort(ids.flatten(), stable=True)  # [T * k]
        ends = torch.searchsorted(chosen, self.experts, right=True, out_int32=True)
        gathered = x.index_select(0, order // ids.shape[1])
        if weigh_input:
            gathered = gathered * weights.flatten()[order, None].to(x.dtype)
        inner = self.silu_mul(F.grouped_mm(gathered, self.gate_up.transpose(1, 2), offs=ends))
        mixed = torch.empty_like(gathered)
        mixed.index_copy_(0, order, F.grouped_mm(inner, self.down.transpose(1, 2), offs=ends))
        mixed = mixed.view(*ids.shape, x.shape[1])
        if weigh_input:
            return mixed.sum(1, dtype=torch.float32).to(x.dtype)
        return (mixed * weights[..., None]).sum(1).to(x.dtype)


def stacked(linears: Seq[Linear]) -> Tensor:
    """The matrices as one [E, N, K], in which the linears have theirs from now on."""
    whole = torch.stack([linear.weight for linear in linears])  # type: ignore[attr-defined]
    for linear, weight in zip(linears, whole, strict=True):
        linear.weight = weight  # type: ignore[attr-defined]
    return whole


class PackedExperts:
    """contracts.Experts over packed matrices. For few tokens each of a token's experts is a row of its own, which reads
    the matrix that it is told of on the device; rows of one expert follow each other, so that its matrix comes from
    memory once. Nothing is waited for, then. For many tokens it is `SortedExperts`."""

    MOST_TOKENS = 64  # beyond, dequantising for each row costs more than the wait and a launch for each expert

    def __init__(
        self,
        kernels: LinearKernels,
        silu_mul: Callable[[Tensor], Tensor],
        gate_up: Seq[PackedLinear],
        down: Seq[PackedLinear],
    ) -> None:
        self.silu_mul = silu_mul
        self.gate_up, self.down = StackedLinear(kernels, gate_up), StackedLinear(kernels, down)
        self.sorted = SortedExperts(silu_mul, gate_up, down)

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor, weigh_input: bool = False) -> Tensor:
        """`weigh_input`: weights are for what goes into the experts, and are rounded to x's dtype."""
        capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()
        if len(x) > self.MOST_TOKENS and not capturing:
            return self.sorted(x, ids, weights, weigh_input)
        chosen, order = torch.sort(ids.flatten(), stable=True)  # [T * k]
        gathered = x.index_select(0, order // ids.shape[1])
        if weigh_input:
            gathered = gathered * weights.flatten()[order, None].to(x.dtype)
        inner = self.silu_mul(self.gate_up(gathered, chosen, x.dtype))
        mixed = torch.empty(len(order), x.shape[1], dtype=torch.float32, device=x.device)
        mixed.index_copy_(0, order, self.down(inner, chosen, torch.float32))
        mixed = mixed.view(*ids.shape, x.shape[1])
        return (mixed if weigh_input else mixed * weights[..., None]).sum(1).to(x.dtype)


class SortedExperts:
    """contracts.Experts: tokens sorted by expert, so that the host waits for the device once, for where each expert's
    begin, and not once for each expert. A token's results are summed in the order of its `ids`."""

    def __init__(self, silu_mul: Callable[[Tensor], Tensor], gate_up: Seq[Linear], down: Seq[Linear]) -> None:
        self.silu_mul, self.gate_up, self.down = silu_mul, gate_up, down

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor, weigh_input: bool = False) -> Tensor:
        """`weigh_input`: weights are for what goes into the experts, and are rounded to x's dtype."""
        chosen, order = torch.sort(ids.flatten(), stable=True)  # [T * k]
        experts = torch.arange(len(self.down) + 1, device=x.device)
        starts = torch.searchsorted(chosen, experts).tolist()  # the one wait
        gathered = x.index_select(0, order // ids.shape[1])
        if weigh_input:
            gathered = gathered * weights.flatten()[order, None].to(x.dtype)
        mixed = torch.empty(len(order), x.shape[1], dtype=torch.float32, device=x.device)
        for expert, (start, end) in enumerate(pairwise(starts)):
            if end > start:
                inner = self.silu_mul(self.gate_up[expert](gathered[start:end]))
                mixed.index_copy_(0, order[start:end], self.down[expert](inner, torch.float32))
        mixed = mixed.view(*ids.shape, x.shape[1])
        return (mixed if weigh_input else mixed * weights[..., None]).sum(1).to(x.dtype)
