"""The part of the kit for op sets that holds `logprobs` to its contract: against float64."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from blade.testing.require import require

if TYPE_CHECKING:
    from torch import Tensor

    from blade.contracts import Ops


def check_logprobs(ops: Ops) -> None:
    import torch

    generator = torch.Generator().manual_seed(0)
    for vocab_size in (1, 3, 64, 1003, 9000):
        logits = torch.randn(5, vocab_size, generator=generator).mul(12).round() / 4  # many equal values
        logits[1, 1:] = -torch.inf
        logits[2] *= 30
        logits[3] += 500
        for k in {0, 1, min(20, vocab_size), min(300, vocab_size)}:
            _check_rows(ops, logits, k)
    _check_spoilt(ops, logits)


def _check_rows(ops: Ops, logits: Tensor, k: int) -> None:
    import torch

    given = ops.to_device(logits.clone())
    log_sums, logprobs, ids = (x.cpu() for x in ops.logprobs(given, k))
    require(torch.equal(given.cpu(), logits), "logprobs: the logits were changed")
    require(log_sums.dtype == logprobs.dtype == torch.float32 and ids.dtype == torch.int64, "logprobs: wrong dtypes")
    require(log_sums.shape == (5,) and logprobs.shape == ids.shape == (5, k), "logprobs: wrong shapes")
    expected = logits.double().log_softmax(-1)
    require(_close(log_sums, logits.double().logsumexp(-1)), "logprobs: these are not the logs of the sums")
    most = expected.sort(-1, descending=True).values[:, :k]
    require(_close(logprobs, most), "logprobs: these are not those of the most likely tokens")
    require(_close(logprobs, expected.gather(1, ids)), "logprobs: these are not those of these ids")
    require(all(len(set(row)) == k for row in ids.tolist()), "logprobs: an id comes twice")
    for i in range(len(logits)):
        alone = [x.cpu() for x in ops.logprobs(ops.to_device(logits[i : i + 1].clone()), k)]
        same = torch.equal(alone[0], log_sums[i : i + 1]) and torch.equal(alone[1], logprobs[i : i + 1])
        require(same, "logprobs: a row must not depend on the rows beside it")


def _close(found: Tensor, expected: Tensor) -> bool:
    """Within what float32 leaves of a difference of numbers up to a thousand."""
    import torch

    return torch.allclose(found.double(), expected, rtol=1e-6, atol=2e-4)


def _check_spoilt(ops: Ops, logits: Tensor) -> None:
    import torch

    logits = logits.clone()
    logits[0, 7], logits[3, 8000] = torch.nan, torch.inf
    log_sums = ops.logprobs(ops.to_device(logits), 4)[0].tolist()
    finite = [math.isfinite(each) for each in log_sums]
    require(finite == [False, True, True, False, True], "logprobs: NaN and infinity must show in the sum")
