"""Drafts of several tokens, made without a word from the device in between.

A draft model or a head makes one token of a draft after the other. The ids that it draws are the ids of its next step,
and they may stay where they are: positions, slots and lengths are known beforehand, and nobody on the host needs the
ids before the last of them is drawn. So the host prepares steps ahead of the device and waits for it once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from blade.engine.batch import build_batch, build_decodes
from blade.engine.edits import Row

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence as Seq

    from torch import Tensor

    from blade.types import Batch, Sequence, Step


class Chain:
    """Steps of which each begins with what the one before it has drawn."""

    def __init__(
        self,
        forward: Callable[[Batch], Tensor],
        guess: Callable[[Tensor, list[Row], list[Tensor]], Tensor],
        block_size: int,
        to_device: Callable[[Tensor], Tensor],
    ) -> None:
        """`forward`: a batch's logits [R, V]. `guess`: an id for each of its rows, [R] on the device, from these and
        the ids that were drawn and not fetched."""
        self._forward, self._guess = forward, guess
        self._block_size, self._to_device = block_size, to_device

    def draft(self, step: Step, limits: Seq[int], texts: Seq[Sequence]) -> list[list[int]]:
        """limits[i] ids that may follow texts[i], whose tokens end where those of step.seqs[i] do. The step has all
        that its sequences owe, and they have blocks for limits[i] - 1 tokens more. Limits fall, and are 1 at least: so
        those that go on are the first ones. The sequences are left as they are."""
        drafts: list[list[int]] = [[] for _ in texts]
        drawn: list[Tensor] = []  # by depth, of as many of the first sequences as go on
        is_read = any(text.params.processors for text in texts)  # they look at ids on the host
        ids: Tensor | None = None
        for depth in range(limits[0]):
            num = sum(limit > depth for limit in limits)
            batch = self._batch(step, depth, num, ids)
            rows = [Row(texts[i], texts[i].num_tokens - 1 + depth, drafts[i]) for i in range(num)]
            ids = self._guess(self._forward(batch), rows, drawn)
            drawn.append(ids)
            if is_read or depth == limits[0] - 1:
                _fetch(drawn, drafts)
                drawn = []
        return drafts

    def _batch(self, step: Step, depth: int, num: int, ids: Tensor | None) -> Batch:
        """The step, and after it one token of each of the first `num` sequences, the last `ids` that were drawn."""
        if ids is None:
            return build_batch(step, self._block_size, self._to_device)
        seqs, nums = step.seqs[:num], step.num_tokens[:num]
        positions = [seq.computed + owed + depth - 1 for seq, owed in zip(seqs, nums, strict=True)]
        return build_decodes(seqs, positions, ids[:num], self._block_size, self._to_device)


def _fetch(drawn: list[Tensor], drafts: list[list[int]]) -> None:
    """Add what was drawn to the drafts: the one copy to the host."""
    ids = iter(torch.cat(drawn).tolist())
    for part in drawn:
        for draft, _ in zip(drafts, range(len(part)), strict=False):
            draft.append(next(ids))
