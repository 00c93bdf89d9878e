"""One rank: forwards a step through the model and samples."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from blade.engine.batch import build_batch, num_rows
from blade.engine.sampler import Row, Sampler
from blade.engine.verify import accept

if TYPE_CHECKING:
    from blade.contracts import Model, Ops
    from blade.types import CaptureOptions, KVCache, Sampled, Sequence, Step


class ModelRunner:
    """Owns a model, its KV cache and the sampler (contracts.Runner)."""

    def __init__(self, model: Model, kv: KVCache, ops: Ops, options: CaptureOptions, secret: int | None = None) -> None:
        """`secret`: see Sampler. Two runners of one secret draw a sequence's tokens with the same random numbers."""
        self.ops = ops
        self.forward = ops.capture(model, kv, options)
        self.block_size = options.block_size
        self.states = model.config.state is not None
        self.sampler = Sampler(model.config.vocab_size, ops, secret)

    @torch.inference_mode()
    def run(self, step: Step) -> list[list[Sampled] | Exception]:
        batch = build_batch(step, self.block_size, self.ops.to_device, self.states)
        logits = self.forward(batch)
        rows = [
            Row(seq, seq.computed + num_tokens - back)
            for seq, num_tokens in zip(step.seqs, step.num_tokens, strict=True)
            for back in range(num_rows(seq, num_tokens), 0, -1)
        ]
        sampled = iter(self.sampler.sample(logits, rows) if rows else [])
        return [
            accept(seq.draft_ids, [next(sampled) for _ in range(num_rows(seq, num_tokens))])
            for seq, num_tokens in zip(step.seqs, step.num_tokens, strict=True)
        ]

    def forget(self, seq: Sequence) -> None:
        self.sampler.forget(seq)
