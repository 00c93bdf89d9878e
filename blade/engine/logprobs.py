"""Log-probabilities of the model's raw distribution: before temperature, penalties and truncation."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from blade.engine import tiles
from blade.types import TokenLogprob

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from torch import Tensor


class RawLogprobs:
    """log_softmax of some rows of the logits as they are now, at few ids: it is never made for all of them."""

    def __init__(self, x: Tensor, rows: Seq[int], num_top: int) -> None:
        """`rows` of x [R, W], and how many most likely tokens at most will be asked for."""
        self._rows = torch.tensor(rows).to(x.device, non_blocking=True)  # does not wait for the forward
        self._logits = x[self._rows]  # a copy: x will be edited  [L, W]
        values, self._ids = tiles.top(self._logits, tiles.peaks(self._logits), max(num_top, 1))
        # log of the sum of all exp(logits), from the share of the most likely one: the fused softmax beats logsumexp.
        self._log_sum = values[:, :1] - torch.softmax(self._logits, -1).amax(-1, keepdim=True).log()
        self._top = values - self._log_sum

    def columns(self, chosen: Tensor) -> Tensor:
        """[L, 1 + 2K] float64: logprob of each row's token in `chosen` [R], the K most likely, and their ids."""
        logprob = self._logits.gather(1, chosen[self._rows, None]) - self._log_sum
        return torch.cat([logprob.double(), self._top.double(), self._ids.double()], 1)


def read_line(line: Seq[float], num_top: int) -> tuple[float, tuple[TokenLogprob, ...]]:
    """One line of `columns` on the host: the token's own logprob, and the num_top most likely, equals by id; fewer
    where fewer are possible at all."""
    num = len(line) // 2
    tops = zip(line[1 : 1 + num], line[1 + num :], strict=True)
    ordered = sorted((-logprob, int(token_id)) for logprob, token_id in tops if logprob > -math.inf)
    return line[0], tuple(TokenLogprob(token_id, -negative) for negative, token_id in ordered[:num_top])
