"""Drafts by a smaller model (Leviathan et al. 2023; Chen et al. 2023), which follows each sequence in a mirror of it.

Both models draw a position's token with the same random number, so that a draft at any temperature comes true about as
often as the two distributions agree; the output is the target's own for every seed (see blade.engine.verify).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence as Seq

import msgspec

from blade import Draft, EngineConfig, Sequence, Step
from blade.contracts import DraftModel

MAX_MIRRORS = 4096  # beyond these the one that was not asked for longest starts anew


class ModelDrafter:
    """contracts.Drafter over the model of ``--draft.model``."""

    def __init__(self, config: EngineConfig, model: DraftModel) -> None:
        self._model = model
        self._max_step_tokens = config.max_batch_tokens
        self._mirrors: OrderedDict[int, Sequence] = OrderedDict()  # by id; the one asked for last at the end

    def propose(self, seqs: Seq[Sequence], limits: Seq[int]) -> list[Draft]:
        followed = [(self._follow(seq), limit) for seq, limit in zip(seqs, limits, strict=True) if limit]
        active = [(mirror, limit) for mirror, limit in followed if mirror is not None]
        self._catch_up([mirror for mirror, _ in active])
        drafts = self._draft(active)
        return [Draft(drafts.get(seq.id, [])) for seq in seqs]

    def forget(self, seq: Sequence) -> None:
        if (mirror := self._mirrors.pop(seq.id, None)) is not None:
            self._drop(mirror)

    def _follow(self, seq: Sequence) -> Sequence | None:
        """The sequence's mirror, with the sequence's tokens. None where the draft model cannot go on."""
        if seq.num_tokens >= self._model.max_context - 1:
            return None
        mirror = self._mirrors.get(seq.id)
        if mirror is None:
            params = msgspec.structs.replace(seq.params, logprobs=None)
            mirror = self._mirrors[seq.id] = Sequence(seq.id, seq.prompt_ids, params, namespace=seq.namespace)
            if len(self._mirrors) > MAX_MIRRORS:
                self._drop(self._mirrors.popitem(last=False)[1])
        self._mirrors.move_to_end(seq.id)
        self._correct(mirror, seq.output_ids)
        if not mirror.blocks and not self._model.blocks.attach_prefix(mirror):
            return None
        self._model.blocks.commit(mirror)
        return mirror

    def _correct(self, mirror: Sequence, output_ids: list[int]) -> None:
        """Take back what the target did not say, and take over what it said."""
        mine, agreed = mirror.output_ids, 0
        start = max(0, mirror.num_committed * self._model.blocks.block_size - len(mirror.prompt_ids))
        agreed = next(
            (i for i in range(min(start, len(mine)), len(mine)) if i >= len(output_ids) or mine[i] != output_ids[i]),
            len(mine),
        )
        if agreed < len(mine):
            del mine[agreed:]
            self._model.runner.forget(mirror)  # what is counted of its output
        mine.extend(output_ids[agreed:])
        # The last token is owed even where it was computed as part of an earlier draft: its logits are gone.
        mirror.computed = min(mirror.computed, len(mirror.prompt_ids) + agreed, mirror.num_tokens - 1)

    def _catch_up(self, mirrors: list[Sequence]) -> None:
        """Compute all but the last token of each, in steps of bounded size."""
        most = self._max_step_tokens
        for mirror in mirrors:
            while mirror.num_owed > most and self._grow(mirror, most, keep=mirrors):
                self._model.runner.run(Step([mirror], [most]))
                mirror.computed += most

    def _draft(self, mirrors: list[tuple[Sequence, int]]) -> dict[int, list[int]]:
        """Ids that may follow, by id of the sequence. `mirrors`: with the most ids of each."""
        keep = [mirror for mirror, _ in mirrors]
        most = self._max_step_tokens
        ready = [(mirror, self._reserve(mirror, limit, keep)) for mirror, limit in mirrors if mirror.num_owed <= most]
        going = sorted((item for item in ready if item[1]), key=lambda item: -item[1])
        drafts = dict[int, list[int]]()
        while going:
            step, limits = Step(), list[int]()
            while going and sum(step.num_tokens) + going[0][0].num_owed <= most:
                mirror, limit = going.pop(0)
                step.add(mirror, mirror.num_owed)
                limits.append(limit)
            for mirror, ids in zip(step.seqs, self._model.runner.draft(step, limits), strict=True):
                mirror.output_ids += ids
                mirror.computed = mirror.num_tokens - 1
                drafts[mirror.id] = ids
        return drafts

    def _reserve(self, mirror: Sequence, limit: int, keep: list[Sequence]) -> int:
        """Blocks for what it owes and for a draft; of how many ids, at most `limit`."""
        limit = min(limit, self._model.max_context - mirror.num_tokens)
        while limit and not self._grow(mirror, mirror.num_owed + limit - 1, keep):
            limit -= 1
        return limit

    def _grow(self, mirror: Sequence, num_tokens: int, keep: list[Sequence]) -> bool:
        """Blocks for its next tokens, if need be those of mirrors that are not in use."""
        while not self._model.blocks.grow(mirror, num_tokens):
            victim = next((m for m in self._mirrors.values() if m.blocks and m not in keep), None)
            if victim is None:
                return False
            self._drop(victim)
        return True

    def _drop(self, mirror: Sequence) -> None:
        """Its tokens are to be computed again, should it be asked for."""
        self._model.blocks.release(mirror)
        self._model.runner.forget(mirror)
