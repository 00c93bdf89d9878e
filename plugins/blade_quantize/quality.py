"""What rounding does to the model's next-token distributions, on a text that it was not calibrated on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from blade_quantize.grids import pieces
from blade_quantize.passes import PassLoader, build, run
from blade_quantize.stack import StreamedLinear

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from collections.abc import Sequence as Seq

    from torch import Tensor

    from blade.contracts import Linear, OpenedModel, Weights
    from blade_quantize.stack import Stack

TOKENS = 128  # whose logits are made together
ROWS = 1 << 14  # of the output head that are read together


@dataclass(frozen=True, slots=True)
class Quality:
    """Of two models on the same text."""

    before: float  # perplexity
    after: float
    divergence: float  # mean Kullback-Leibler divergence of the one after from the one before, nats
    agreement: float  # share of tokens after which the likeliest next one is the same
    num_tokens: int

    def __str__(self) -> str:
        return (
            f"perplexity {self.before:.3f} -> {self.after:.3f}, divergence {self.divergence:.4f} nats, "
            f"same likeliest token {self.agreement:.1%} (of {self.num_tokens} tokens)"
        )


def hidden_states(
    opened: OpenedModel,
    weights: Weights,
    ids: Seq[int],
    rounded: Callable[[Tensor], Tensor] | None = None,
    quantized: Collection[str] = (),
    told: Callable[[], None] | None = None,
) -> tuple[Tensor, str]:
    """What the output head is given for each token, [T, D], and the head's name. `rounded`: what becomes of the
    activations of `quantized` modules. `told` is called as each stack is come to."""

    def linear(stack: Stack) -> Linear:
        return StreamedLinear(stack, rounded if stack.prefixes[0] in quantized else None, told)

    loader = PassLoader(opened, weights, linear)
    run(build(opened, loader, len(ids)), [ids], opened.ops)
    return loader.head.states(), loader.head_prefix


@torch.no_grad()
def compare(weights: Weights, head: str, before: Tensor, after: Tensor, ids: Seq[int]) -> Quality:
    """`before` and `after` [T, D] go through the output head of `weights` under `head`."""
    targets = torch.tensor([*ids[1:], 0], device=before.device)
    sums = torch.zeros(4, dtype=torch.float64)
    for old, new, target in zip(*(pieces(each, TOKENS) for each in (before, after, targets)), strict=True):
        p, q = (log_probs(weights, head, x) for x in (old, new))
        nats = torch.stack([each.gather(1, target[:, None]).squeeze(1) for each in (p, q)])
        sums[2] += (p.exp() * (p - q)).sum().cpu()
        sums[3] += (p.argmax(-1) == q.argmax(-1)).sum().cpu()
        sums[:2] -= nats.sum(1).cpu()
        last = nats[:, -1].cpu()
    sums[:2] += last  # no token follows the last
    pairs = len(ids) - 1
    return Quality(
        before=math.exp(float(sums[0]) / pairs),
        after=math.exp(float(sums[1]) / pairs),
        divergence=float(sums[2]) / len(ids),
        agreement=float(sums[3]) / len(ids),
        num_tokens=len(ids),
    )


def log_probs(weights: Weights, head: str, x: Tensor) -> Tensor:
    """x [T, D] -> [T, V], a few rows of the head at a time."""
    table = weights.get(f"{head}.weight")
    logits = torch.cat([x @ rows.to(x.device, x.dtype).T for rows in pieces(table, ROWS)], dim=1)
    if f"{head}.bias" in set(weights.names()):
        logits += weights.get(f"{head}.bias").to(x.device, x.dtype)
    return torch.log_softmax(logits, dim=-1)
