"""One rank: forwards a step through the model, samples, and keeps of a draft what the model agrees with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from blade.engine.batch import build_batch, num_rows
from blade.engine.sampler import Row, Sampler

if TYPE_CHECKING:
    from blade.contracts import Model, Ops
    from blade.types import KVCache, Sampled, Sequence, Step


class ModelRunner:
    """Owns a model, its KV cache and the sampler (contracts.Runner)."""

    def __init__(self, model: Model, kv: KVCache, ops: Ops, block_size: int) -> None:
        self.model = model
        self.kv = kv
        self.ops = ops
        self.block_size = block_size
        self.sampler = Sampler(model.config.vocab_size, ops.device)

    @torch.inference_mode()
    def run(self, step: Step) -> list[list[Sampled] | Exception]:
        batch = build_batch(step, self.block_size, self.ops.to_device)
        logits = self.model.forward(batch, self.kv)
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


def accept(draft_ids: list[int], sampled: list[Sampled | Exception]) -> list[Sampled] | Exception:
    """The sampled tokens up to and with the first that the draft did not foresee.

    Each row was sampled from the model's own distribution given the tokens before it, with a random number that
    depends on the position alone. So what is kept is, token for token, what would have been sampled without a draft:
    lossless for every setting, with the acceptance of rejection sampling for a draft without probabilities
    (Leviathan et al. 2023, where q is one-hot).
    """
    kept: list[Sampled] = []
    for i, token in enumerate(sampled):
        if isinstance(token, Exception):
            return token
        kept.append(token)
        if i == len(draft_ids) or token.token_id != draft_ids[i]:
            break
    return kept
