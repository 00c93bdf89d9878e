"""The part of the kit for op sets that holds `draw` to its contract: against sorted float64."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, NamedTuple

from blade.testing.require import require

if TYPE_CHECKING:
    from torch import Tensor

    from blade.contracts import Ops

_NUM_ROWS = 9
_ROUNDING = 1e-5  # of a share
_OFF = 1 << 40  # a top_k that keeps all


class _Settings(NamedTuple):
    temperature: float
    top_k: int
    top_p: float
    min_p: float


_ALL_SETTINGS = [
    _Settings(*each) for each in itertools.product((0.6, 1.5), (1, 4, 300, _OFF), (0.3, 0.95, math.inf), (0.0, 0.02))
]


def check_draw(ops: Ops) -> None:
    """Nothing, where the op set has no kernel for it."""
    import torch

    generator = torch.Generator().manual_seed(0)
    for vocab_size in (3, 64, 1003, 9000):
        for settings in _ALL_SETTINGS:
            logits = torch.randn(_NUM_ROWS, vocab_size, generator=generator).mul(12).round() / 4  # many equal values
            logits[1, 1:] = -torch.inf
            u = torch.rand(_NUM_ROWS, generator=generator, dtype=torch.float64)
            found = _draw(ops, logits, [settings] * _NUM_ROWS, u)
            if found is None:
                return
            peaks, ids = found
            require(peaks == logits.amax(-1).tolist(), "draw: these are not the largest values")
            for row, token_id, share in zip(logits, ids, u.tolist(), strict=True):
                low, high = _shares(row, settings, token_id)
                fits = low - _ROUNDING <= share <= high + _ROUNDING
                require(fits, f"draw: {share} of what {settings} leaves lies not in {token_id}: {low} to {high}")
    _check_mixed(ops, logits, u)


def _check_mixed(ops: Ops, logits: Tensor, u: Tensor) -> None:
    import torch

    settings = _ALL_SETTINGS[-_NUM_ROWS:]
    settings[0] = settings[0]._replace(temperature=0)
    logits[2, 17] = torch.nan
    peaks, ids = _draw(ops, logits, settings, u) or ([], [])
    require(
        [math.isfinite(peak) for peak in peaks] == [i != 2 for i in range(len(u))], "draw: NaN must show in its peak"
    )
    require(ids[0] == int(logits[0].argmax()), "draw: at temperature 0 it is the first of the most likely ones")
    for i in range(3, len(u)):
        alone = _draw(ops, logits[i : i + 1], settings[i : i + 1], u[i : i + 1])
        require(alone == ([peaks[i]], [ids[i]]), "draw: a row must not depend on the rows beside it")


def _draw(ops: Ops, logits: Tensor, settings: list[_Settings], u: Tensor) -> tuple[list[float], list[int]] | None:
    import torch

    dtypes = (torch.float32, torch.int64, torch.float64, torch.float32)
    temperatures, top_k, top_p, min_p = (
        ops.to_device(torch.tensor(list(column), dtype=dtype))
        for column, dtype in zip(zip(*settings, strict=True), dtypes, strict=True)
    )
    found = ops.draw(ops.to_device(logits.clone()), temperatures, top_k, top_p, min_p, ops.to_device(u))
    return found and (found[0].tolist(), found[1].tolist())


def _shares(logits: Tensor, settings: _Settings, token_id: int) -> tuple[float, float]:
    """From which to which u the token is drawn; an empty range where it is not kept."""
    import torch

    weights = torch.exp((logits.double() - logits.max()) / settings.temperature)
    weights[weights < weights.sort(descending=True).values[min(settings.top_k, len(weights)) - 1]] = 0
    ordered = weights.sort(descending=True).values
    least = ordered[ordered.cumsum(0) - ordered < settings.top_p * weights.sum()].min()
    weights[weights < max(float(least), settings.min_p)] = 0
    if not weights[token_id]:
        return math.inf, -math.inf
    sums = weights.cumsum(0) / weights.sum()
    return float(sums[token_id - 1]) if token_id else 0.0, float(sums[token_id])
