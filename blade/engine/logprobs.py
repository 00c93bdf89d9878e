"""Log-probabilities of the model's raw distribution: before temperature, penalties and truncation."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from blade.types import TokenLogprob

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from torch import Tensor

    from blade.contracts import Ops


class RawLogprobs:
    """log_softmax of some rows of the logits as they are now, at few ids: it is never made for all of them."""

    def __init__(self, ops: Ops, x: Tensor, rows: Seq[int], num_top: int, stays: bool) -> None:
        """`rows` of x [R, V], and how many most likely tokens at most will be asked for. `stays`: x will not change."""
        self._rows = ops.to_device(torch.tensor(rows))  # does not wait for the forward
        self._logits = x if stays and len(rows) == len(x) else ops.take_rows(x, self._rows)  # [L, V]
        log_sums, self._top, self._ids = ops.logprobs(self._logits, min(num_top, x.shape[1]))
        self._log_sums = log_sums[:, None]

    def columns(self, chosen: Tensor) -> Tensor:
        """[L, 1 + 2K] float64: logprob of each row's token in `chosen` [R], the K most likely, and their ids."""
        last = self._logits.shape[1] - 1  # of a row with nothing to draw from the token may lie beyond
        logprob = self._logits.gather(1, chosen[self._rows, None].clamp(max=last)) - self._log_sums
        return torch.cat([logprob.double(), self._top.double(), self._ids.double()], 1)


def read_line(line: Seq[float], num_top: int) -> tuple[float, tuple[TokenLogprob, ...]]:
    """One line of `columns` on the host: the token's own logprob, and the num_top most likely, equals by id; fewer
    where fewer are possible at all."""
    num = len(line) // 2
    tops = zip(line[1 : 1 + num], line[1 + num :], strict=True)
    ordered = sorted((-logprob, int(token_id)) for logprob, token_id in tops if logprob > -math.inf)
    return line[0], tuple(TokenLogprob(token_id, -negative) for negative, token_id in ordered[:num_top])
