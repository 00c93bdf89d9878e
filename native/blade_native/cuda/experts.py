"""A mixture of experts on CUDA, over whatever linears its experts have."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence as Seq

    from torch import Tensor

    from blade.contracts import Linear


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
