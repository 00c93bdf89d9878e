"""Drawing from the tokens that top_k, top_p and min_p leave over, without sorting the vocabulary.

In the order of transformers, after the temperature: top_k (Fan et al. 2018), top_p of what top_k left (nucleus,
Holtzman et al. 2020), min_p (Nguyen et al. 2024). Each keeps whatever is as likely as the last token it has to keep: so
the kept set follows from the logits alone, also where they are equal, and it is drawn from in the order of ids.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch

from blade.engine import tiles

if TYPE_CHECKING:
    from torch import Tensor

ALL = 1 << 40  # beyond any vocabulary, and exact as a float
SIZES = (64, 1024, ALL)  # how many of the most likely tokens are looked at, one after the other


@dataclass(slots=True)
class Settings:
    """One entry per row, all on the device: what contracts.Ops.draw wants to know, in its order."""

    temperatures: Tensor  # [R] float32, 0: greedy
    top_k: Tensor  # [R] int64, ALL is off
    top_p: Tensor  # [R] float64, infinity is off
    min_p: Tensor  # [R] float32, 0 is off
    u: Tensor  # [R] float64, uniform in [0, 1)

    def of(self, rows: Tensor) -> Settings:
        return Settings(*(getattr(self, f.name)[rows] for f in fields(self)))


def more_than(size: int) -> int:
    """The next number of tokens to look at. Begin with more_than(top_k), so that the top k can be enough."""
    return next(larger for larger in SIZES if larger > size)


def draw_from_top(x: Tensor, tile_peaks: Tensor, settings: Settings, size: int, whole: bool) -> tuple[Tensor, Tensor]:
    """Ids [R] drawn from logits x [R, W], and [R] bool: whether the `size` most likely tokens were enough, which is
    when the least likely of them is not kept. `whole`: no row has a top_k, so top_p is a share of all tokens."""
    logits, ids = tiles.top(x, tile_peaks, size)  # [R, K], descending
    top, last = logits[:, :1], logits[:, -1]
    kept = logits >= logits.gather(1, settings.top_k[:, None].clamp(max=logits.shape[1]) - 1)
    if whole:
        shares = (logits - top).exp() * torch.softmax(x, -1).amax(-1, keepdim=True)
    else:
        shares = torch.softmax(logits.masked_fill(~kept, float("-inf")), -1)
    shares = shares.double()
    kept &= shares.cumsum(-1) - shares < settings.top_p[:, None]
    kept &= logits >= top + settings.min_p[:, None].log()
    threshold = torch.where(kept, logits, float("inf")).amin(-1)
    enough = (last < threshold) | (last == float("-inf")) | (logits.shape[1] == x.shape[1])
    weights = torch.where(logits >= threshold[:, None], (logits - top).exp(), 0.0)
    ids, order = ids.sort(-1)
    index, _ = tiles.invert_cdf(weights.gather(1, order), settings.u)
    return ids.gather(1, index[:, None]).squeeze(1), enough


def draw_from_all(x: Tensor, settings: Settings, whole: bool) -> Tensor:
    """The same for any number of kept tokens: ids [R]. Ten times the work, the cost of flat distributions."""
    weights = torch.softmax(x, -1)
    if not whole:
        weights = _keep(weights, _threshold(weights, torch.ones_like(weights), settings.top_k.double()))
    limit = tiles.total(weights) * settings.top_p
    weights = _keep(weights, _threshold(weights, weights, limit))
    weights = weights.masked_fill_(weights < settings.min_p[:, None] * weights.amax(-1, keepdim=True), 0)
    return tiles.draw(weights, settings.u)


def _threshold(weights: Tensor, amounts: Tensor, limit: Tensor) -> Tensor:
    """[R] int32, the bits of the least weight that is kept, when a token is kept as long as the amounts of those with
    more weight add up to less than limit [R]. By bisection: the bits of positive floats are ordered as they are."""
    low = torch.zeros_like(limit, dtype=torch.int32)
    high = weights.amax(-1).view(torch.int32)
    above = torch.empty_like(weights)
    for _ in range(31):
        middle = low + (high - low) // 2
        # Written as 0 and 1 in float32 and multiplied: torch.where takes ten times as long on a CPU.
        torch.gt(weights, middle.view(torch.float32)[:, None], out=above)
        too_much = tiles.total(above.mul_(amounts)) >= limit
        low, high = torch.where(too_much, middle + 1, low), torch.where(too_much, high, middle)
    return high


def _keep(weights: Tensor, threshold: Tensor) -> Tensor:
    return weights.masked_fill(weights.view(torch.int32) < threshold[:, None], 0)
