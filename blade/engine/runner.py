"""One rank: forwards a step through the model and samples."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from blade.engine.adapted import AdaptedForward
from blade.engine.batch import build_batch, build_decodes, num_rows
from blade.engine.chain import Chain
from blade.engine.sampler import Row, Sampler
from blade.engine.trees import paths, tree_of
from blade.engine.verify import accept

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence as Seq

    from torch import Tensor

    from blade.contracts import Model, Ops
    from blade.engine.drafting import GuardedDrafter
    from blade.engine.hidden import HiddenStates
    from blade.engine.sampler import BegunSampling
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
        # Elsewhere a step is over when its launch is; states and what drafters read change with every step.
        self.overlaps = ops.device.type == "cuda" and not (self.states or hidden or tree_drafters)
        self.sampler = Sampler(model.config.vocab_size, ops, secret)
        self.chain = Chain(self.forward, self.sampler.guess, options.block_size, ops.to_device)

    @torch.inference_mode()
    def run(self, step: Step) -> list[list[Sampled] | Exception]:
        batch = build_batch(step, self.block_size, self.ops.to_device, self.states)
        logits = self._forward(step, batch, [num_rows(*owed) for owed in zip(step.seqs, step.num_tokens, strict=True)])
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
    def begin(self, step: Step, after: BegunStep | None = None) -> BegunStep | None:
        """See contracts.Overlapping."""
        if not self.overlaps or not all(self.sampler.is_simple(seq.params) and not seq.draft_ids for seq in step.seqs):
            return None
        if after is None:
            if any(not num_rows(*owed) for owed in zip(step.seqs, step.num_tokens, strict=True)):
                return None
            batch, drawn = build_batch(step, self.block_size, self.ops.to_device), []
            positions = [seq.num_tokens - 1 for seq in step.seqs]
        else:
            positions = [seq.num_tokens for seq in step.seqs]
            drawn = [after.ids_of(step.seqs, self.ops.to_device)]
            batch = build_decodes(step.seqs, positions, drawn[0], self.block_size, self.ops.to_device)
        logits = self._forward(step, batch, [1] * len(step))
        rows = [Row(seq, position) for seq, position in zip(step.seqs, positions, strict=True)]
        return BegunStep(step.seqs, self.sampler.begin(logits, rows, drawn))

    @torch.inference_mode()
    def draft(self, step: Step, limits: Seq[int]) -> list[list[int]]:
        return self.chain.draft(step, limits, step.seqs)

    def _forward(self, step: Step, batch: Batch, rows: list[int]) -> Tensor:
        """`rows`: how many each sequence has of the logits."""
        adapters = [seq.adapter for seq in step.seqs]
        if self.adapted is None or not any(adapters):
            return self.forward(batch)
        return self.adapted(batch, _repeated(adapters, step.num_tokens), _repeated(adapters, rows))

    def forget(self, seq: Sequence) -> None:
        self.sampler.forget(seq)


class BegunStep:
    """contracts.BegunStep of one rank: every sequence has one row."""

    def __init__(self, seqs: list[Sequence], sampling: BegunSampling) -> None:
        self._row_of = {seq.id: row for row, seq in enumerate(seqs)}
        self._sampling = sampling
        self.wrong: set[int] = set()

    def ids_of(self, seqs: list[Sequence], to_device: Callable[[Tensor], Tensor]) -> Tensor:
        """What is drawn for some of the sequences, [len(seqs)] int64 on the device."""
        rows, ids = [self._row_of[seq.id] for seq in seqs], self._sampling.ids
        return ids if rows == list(range(len(ids))) else ids[to_device(torch.tensor(rows))]

    @torch.inference_mode()
    def results(self) -> list[list[Sampled] | Exception]:
        results, right = self._sampling.results()
        self.wrong = {seq_id for seq_id, row in self._row_of.items() if not right[row]}
        return [result if isinstance(result, Exception) else [result] for result in results]


def _rows(seq: Sequence, num_tokens: int) -> list[Row]:
    """Of logits: what follows the last of the tokens that are sure, and each draft."""
    num, end = num_rows(seq, num_tokens), seq.computed + num_tokens
    parents = tree_of(seq)
    if num and parents is not None:
        return [Row(seq, end - num + len(path), path) for path in paths(seq.draft_ids, parents)]
    return [Row(seq, end - back) for back in range(num, 0, -1)]


def _repeated(adapters: list[Any], nums: list[int]) -> list[Any]:
    return [adapter for adapter, num in zip(adapters, nums, strict=True) for _ in range(num)]
