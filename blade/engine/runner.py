"""One rank: forwards a step through the model and samples."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from blade.engine.adapted import AdaptedForward
from blade.engine.batch import build_batch, num_rows
from blade.engine.chain import Chain
from blade.engine.sampler import Row, Sampler
from blade.engine.trees import paths, tree_of
from blade.engine.verify import accept

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from torch import Tensor

    from blade.contracts import Model, Ops
    from blade.engine.drafting import GuardedDrafter
    from blade.engine.hidden import HiddenStates
    from blade.nn.lora import Adapters
    from blade.types import Batch, CaptureOptions, KVCache, Sampled, Sequence, Step


class ModelRunner:
    """Owns a model, its KV cache and the sampler (contracts.Runner; of a draft model, contracts.DraftRunner)."""

    def __init__(
        self,
        model: Model,
        kv: KVCache,
        ops: Ops,
        options: CaptureOptions,
        secret: int | None = None,
        adapters: Adapters | None = None,
        hidden: HiddenStates | None = None,
        tree_drafters: Seq[GuardedDrafter] = (),
    ) -> None:
        """`secret`: see Sampler. Two runners of one secret draw a sequence's tokens with the same random numbers.
        `adapters`: of the model, where sequences may have one. `hidden`: what it shows of its hidden states, where
        somebody reads them. `tree_drafters`: are told what is sampled along trees."""
        self.ops = ops
        self.forward = ops.capture(model, kv, options)
        self.adapted = AdaptedForward(model, kv, ops, options, adapters) if adapters else None
        self.hidden = hidden
        self.tree_drafters = tree_drafters
        self.block_size = options.block_size
        self.states = model.config.state is not None
        self.sampler = Sampler(model.config.vocab_size, ops, secret)
        self.chain = Chain(self.forward, self.sampler.guess, options.block_size, ops.to_device)

    @torch.inference_mode()
    def run(self, step: Step) -> list[list[Sampled] | Exception]:
        batch = build_batch(step, self.block_size, self.ops.to_device, self.states)
        logits = self._forward(step, batch)
        parts = [_rows(seq, num_tokens) for seq, num_tokens in zip(step.seqs, step.num_tokens, strict=True)]
        rows = [row for part in parts for row in part]
        drawn = iter(self.sampler.sample(logits, rows) if rows else [])
        sampled = [[next(drawn) for _ in part] for part in parts]
        results = [
            accept(seq.draft_ids, part, tree_of(seq)) if part else []
            for seq, part in zip(step.seqs, sampled, strict=True)
        ]
        for drafter in self.tree_drafters:
            drafter.sampled(step.seqs, sampled)
        if self.hidden is not None:
            self.hidden.hand_over(step, results)
        return results

    @torch.inference_mode()
    def draft(self, step: Step, limits: Seq[int]) -> list[list[int]]:
        return self.chain.draft(step, limits, step.seqs)

    def _forward(self, step: Step, batch: Batch) -> Tensor:
        adapters = [seq.adapter for seq in step.seqs]
        if self.adapted is None or not any(adapters):
            return self.forward(batch)
        tokens = _repeated(adapters, step.num_tokens)
        rows = _repeated(adapters, [num_rows(seq, num) for seq, num in zip(step.seqs, step.num_tokens, strict=True)])
        return self.adapted(batch, tokens, rows)

    def forget(self, seq: Sequence) -> None:
        self.sampler.forget(seq)


def _rows(seq: Sequence, num_tokens: int) -> list[Row]:
    """Of logits: what follows the last of the tokens that are sure, and each draft."""
    num, end = num_rows(seq, num_tokens), seq.computed + num_tokens
    parents = tree_of(seq)
    if num and parents is not None:
        return [Row(seq, end - num + len(path), path) for path in paths(seq.draft_ids, parents)]
    return [Row(seq, end - back) for back in range(num, 0, -1)]


def _repeated(adapters: list[Any], nums: list[int]) -> list[Any]:
    return [adapter for adapter, num in zip(adapters, nums, strict=True) for _ in range(num)]
