"""Runs a head (contracts.Head) and samples from it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from blade.engine.batch import build_batch
from blade.engine.chain import Chain
from blade.engine.sampler import Row, Sampler

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from torch import Tensor

    from blade.contracts import Head, Ops
    from blade.types import Batch, CaptureOptions, KVCache, Sequence, Step


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
        self._states = torch.zeros(max_tokens, head.width, dtype=head.dtype, device=ops.device)
        self._sampler = Sampler(head.config.vocab_size, ops, secret)
        self._forward = ops.capture(self, kv, options)
        self._chain = Chain(self._forward, self._guess, options.block_size, ops.to_device)

    def forward(self, batch: Batch, kv: KVCache) -> Tensor:
        """Logits [R, the head's own vocabulary] float32 after the places whose states are in `_states`. What is left
        there takes their place, for the step that goes on from it."""
        logits, left = self._head.forward(batch, self._states[: len(batch.input_ids)], kv)
        self._ops.copy_rows(left, self._states[: len(left)])
        return logits

    @torch.inference_mode()
    def run(self, step: Step, hidden: Seq[Tensor]) -> None:
        self._enter(hidden)
        batch = build_batch(step, self._block_size, self._ops.to_device)
        self._forward(replace(batch, logits_rows=batch.logits_rows[:0]))  # what might follow is not asked for

    @torch.inference_mode()
    def draft(self, step: Step, hidden: Seq[Tensor], texts: Seq[Sequence], limits: Seq[int]) -> list[list[int]]:
        self._enter(hidden)
        return self._chain.draft(step, limits, texts)

    def forget(self, text: Sequence) -> None:
        self._sampler.forget(text)

    def _enter(self, hidden: Seq[Tensor]) -> None:
        states = self._head.enter(hidden[0] if len(hidden) == 1 else torch.cat([*hidden]))
        self._states[: len(states)].copy_(states)

    def _guess(self, logits: Tensor, rows: Seq[Row], drawn: Seq[Tensor]) -> Tensor:
        """Of the model's ids; those that the head does not know are never drawn."""
        ids = self._head.target_ids
        if ids is None:
            return self._sampler.guess(logits, rows, drawn)
        if self._sampler.is_plain(rows):
            return ids[self._sampler.guess(logits, rows)]
        shape = len(logits), self.config.vocab_size
        of_target = torch.full(shape, -torch.inf, device=logits.device).index_copy_(1, ids, logits)
        return self._sampler.guess(of_target, rows, drawn)
