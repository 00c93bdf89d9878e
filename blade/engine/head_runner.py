"""Runs a head (contracts.Head) and samples from it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from blade.engine.batch import build_batch
from blade.engine.sampler import Row, Sampler

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from torch import Tensor

    from blade.contracts import Head, Ops
    from blade.types import Batch, CaptureOptions, KVCache, Sampled, Sequence, Step


class HeadRunner:
    """contracts.HeadRunner; to the op set it is a model, whose steps may be captured: the states that come in and go
    out lie in memory of its own."""

    def __init__(
        self, head: Head, kv: KVCache, ops: Ops, options: CaptureOptions, secret: int | None, max_tokens: int
    ) -> None:
        """`secret`: see ModelRunner. `max_tokens`: of a step."""
        self.config = head.config
        self.hidden_states = head.hidden_states
        self._head, self._ops, self._block_size = head, ops, options.block_size
        shape = (max_tokens, head.width)
        self._states = torch.zeros(shape, dtype=head.dtype, device=ops.device)
        self._left = torch.zeros(shape, dtype=head.dtype, device=ops.device)
        self._sampler = Sampler(head.config.vocab_size, ops, secret)
        self._forward = ops.capture(self, kv, options)

    def forward(self, batch: Batch, kv: KVCache) -> Tensor:
        """Logits [R, the head's own vocabulary] float32 after the places whose states are in `_states`; what is left
        there goes to `_left`."""
        logits, left = self._head.forward(batch, self._states[: len(batch.input_ids)], kv)
        self._ops.copy_rows(left, self._left[: len(left)])
        return logits

    @torch.inference_mode()
    def enter(self, hidden: Tensor) -> Tensor:
        return self._head.enter(hidden)

    @torch.inference_mode()
    def run(
        self, step: Step, states: Seq[Tensor], texts: Seq[Sequence] = ()
    ) -> tuple[list[Sampled | Exception], Tensor]:
        start = 0
        for part in states:
            self._states[start : start + len(part)].copy_(part)
            start += len(part)
        batch = build_batch(step, self._block_size, self._ops.to_device)
        if not texts:  # what might follow is not asked for
            batch = replace(batch, logits_rows=batch.logits_rows[:0])
        logits = self._forward(batch)
        left = self._left[: len(texts)]
        if not texts:
            return [], left
        rows = [Row(text, text.num_tokens - 1) for text in texts]
        return [*self._sampler.sample(self._of_target(logits), rows)], left

    def forget(self, text: Sequence) -> None:
        self._sampler.forget(text)

    def _of_target(self, logits: Tensor) -> Tensor:
        """[R, vocab_size]; tokens that the head does not know are never drawn."""
        ids = self._head.target_ids
        if ids is None:
            return logits
        shape = len(logits), self.config.vocab_size
        return torch.full(shape, -torch.inf, device=logits.device).index_copy_(1, ids, logits)
