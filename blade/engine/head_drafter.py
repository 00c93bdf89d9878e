"""Drafts by a head: one token after the other, from the hidden states of the model and then from the head's own
(EAGLE, Li et al. 2024; multi-token prediction, Gloeckle et al. 2024).

A head has one place for each token but the first of a sequence, where it is given the hidden state of the token before
(see contracts.Head), and KV of its own for each. Places of prompts are computed when their hidden states have come,
those of single tokens when a draft is asked for: until then states wait. Where too many do nobody asks, and nothing is
computed for nothing: the head begins anew with the last of them. What it guessed itself is computed anew once the
model's own states are there.

Where the model found a prefix in its cache nobody computes hidden states of it. The head then takes its own KV of that
prefix from its own cache, or, if it is not there, begins where the hidden states do: it sees less, and the text stays
the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from blade.types import Draft, Sequence, Step

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable
    from collections.abc import Sequence as Seq

    from torch import Tensor

    from blade.config import EngineConfig
    from blade.contracts import DraftHead

READ_AT, READ_EACH = 64, 8  # places of prompts that may wait, in all and for each sequence: together they cost less
MOST_UNREAD, KEPT = 64, 8  # single tokens whose states may wait; that the head begins anew with


class Mirror:
    """A sequence as the head sees it."""

    def __init__(self, seq: Sequence, base: int) -> None:
        """`base`: position of the first hidden state there is."""
        params = msgspec.structs.replace(seq.params, logprobs=None)
        self.base = base
        self.text = Sequence(seq.id, seq.prompt_ids, params)  # what is drawn depends on it
        # Its tokens are those after base; what is computed of it are the places whose KV is right.
        namespace = b"%d|%b" % (seq.prompt_ids[0], seq.namespace)  # states depend on the first token as well
        self.places = Sequence(seq.id, seq.prompt_ids[base + 1 :], params, namespace=namespace)
        self.unread: list[Tensor] = []  # hidden states of the places after those that are computed, in parts
        self.num_unread = 0
        self.last: Tensor | None = None  # [1, ...], that of the last place that was computed

    @property
    def end(self) -> int:
        """Position of the first token whose hidden state has not come."""
        return self.base + self.places.computed + self.num_unread

    @property
    def num_ready(self) -> int:
        """Places that can be computed: whose state and token are there."""
        return min(self.num_unread, self.places.num_owed)

    @property
    def awaits_prompt(self) -> bool:
        """Some of what waits is of the prompt."""
        return self.base + self.places.computed < len(self.text.prompt_ids) - 1

    def follow(self, seq: Sequence) -> None:
        """Take over what the model has said."""
        self.text.output_ids += seq.output_ids[len(self.text.output_ids) :]
        skipped = max(0, self.base + 1 - len(seq.prompt_ids))
        self.places.output_ids += self.text.output_ids[skipped + len(self.places.output_ids) :]

    def take(self, span: range, hidden: Tensor, row: int) -> None:
        """The states of these positions, hidden[row] that of the first; those that are known already count for
        nothing. They lie where they are until `keep`."""
        num_known = self.end - span.start
        if num_known < len(span):
            self.unread.append(hidden[row + num_known : row + len(span)])
            self.num_unread += len(span) - num_known

    def keep(self) -> None:
        """What was taken last will be overwritten."""
        if self.unread:
            self.unread[-1] = self.unread[-1].clone()

    def pop(self, num: int) -> list[Tensor]:
        """The states of the next `num` places."""
        parts, left = [], num
        while left:
            part = self.unread[0][:left]
            parts.append(part)
            left -= len(part)
            rest = self.unread[0][len(part) :]
            self.unread[:1] = [rest.clone()] if len(rest) else []  # the rest of the step is not to be kept for it
        self.num_unread -= num
        self.last = parts[-1][-1:].clone()
        return parts

    def step_back(self) -> None:
        """Compute the last place again: it is known already, and what follows it is wanted."""
        if not self.num_ready and self.last is not None:
            self.places.computed -= 1
            self.unread.insert(0, self.last)
            self.num_unread += 1


class HeadDrafter:
    """contracts.HiddenReader over a head."""

    def __init__(self, config: EngineConfig, head: DraftHead) -> None:
        self.hidden_states = head.runner.hidden_states
        self._runner, self._blocks, self._max_context = head.runner, head.blocks, head.max_context
        self._max_step_tokens = config.max_batch_tokens
        self._mirrors: dict[int, Mirror] = {}  # by id of the sequence

    def observe(self, seqs: Seq[Sequence], spans: Seq[range], rows: Seq[int], hidden: Tensor) -> None:
        for seq, span, row in zip(seqs, spans, rows, strict=True):
            mirror = self._mirrors.get(seq.id)
            if mirror is None or span.start > mirror.end:
                self.forget(seq)
                mirror = self._mirrors[seq.id] = self._begin(seq, span.start)
            mirror.follow(seq)
            mirror.take(span, hidden, row)
        prompts = [mirror for mirror in self._mirrors.values() if mirror.awaits_prompt]
        if sum(mirror.num_unread for mirror in prompts) >= READ_AT + READ_EACH * len(prompts):
            self._read(prompts)
        for seq in seqs:
            if (mirror := self._mirrors.get(seq.id)) is not None:
                mirror.keep()
                if mirror.num_unread > MOST_UNREAD and not mirror.awaits_prompt:
                    self._begin_anew(seq, mirror)

    def propose(self, seqs: Seq[Sequence], limits: Seq[int]) -> list[Draft]:
        mirrors = [self._ready(seq) if limit else None for seq, limit in zip(seqs, limits, strict=True)]
        going = [
            (mirror, min(limit, self._max_context - mirror.places.num_tokens))
            for mirror, limit in zip(mirrors, limits, strict=True)
            if mirror is not None
        ][: self._max_step_tokens]
        if sum(mirror.num_ready for mirror, _ in going) > self._max_step_tokens:
            self._read([mirror for mirror, _ in going], keep=1)
        drafts = self._draft([item for item in going if self._is_known(item[0])])
        return [Draft(drafts.get(seq.id, [])) for seq in seqs]

    def forget(self, seq: Sequence) -> None:
        if (mirror := self._mirrors.pop(seq.id, None)) is not None:
            self._blocks.release(mirror.places)
            self._runner.forget(mirror.text)

    def _begin(self, seq: Sequence, start: int) -> Mirror:
        """A mirror of a sequence whose hidden states come from position `start` on."""
        whole = Mirror(seq, 0)
        whole.follow(seq)
        attached = self._blocks.attach_prefix(whole.places)
        if not start or (attached and whole.places.computed >= start):
            return whole
        self._blocks.release(whole.places)
        return Mirror(seq, start)

    def _begin_anew(self, seq: Sequence, mirror: Mirror) -> None:
        """With the last of the states that wait."""
        kept, end = mirror.unread[-KEPT:], mirror.end
        num = sum(len(part) for part in kept)
        self.forget(seq)
        late = self._mirrors[seq.id] = Mirror(seq, end - num)
        late.follow(seq)
        late.unread, late.num_unread = kept, num

    def _ready(self, seq: Sequence) -> Mirror | None:
        """The sequence's mirror, with a place to go on from; None where there is none."""
        mirror = self._mirrors.get(seq.id)
        if mirror is None:
            return None
        mirror.follow(seq)
        if mirror.end != mirror.text.num_tokens - 1 or mirror.places.num_tokens >= self._max_context:
            return None
        mirror.step_back()
        return mirror if mirror.num_ready else None

    def _read(self, mirrors: Iterable[Mirror], keep: int = 0) -> None:
        """Compute the places that are ready, but for the last `keep` of each, in steps of bounded size."""
        step = Step()
        parts: list[Tensor] = []
        for mirror in mirrors:
            if not self._is_known(mirror):
                continue
            while (num := min(mirror.num_ready - keep, self._max_step_tokens - sum(step.num_tokens))) > 0:
                if not self._grow(mirror, num, {places.id for places in step.seqs}):
                    self.forget(mirror.text)  # what comes next begins a new one
                    break
                step.add(mirror.places, num)
                parts += mirror.pop(num)
                if sum(step.num_tokens) == self._max_step_tokens:
                    self._compute(step, parts)
                    step, parts = Step(), []
        if len(step):
            self._compute(step, parts)

    def _compute(self, step: Step, parts: list[Tensor]) -> None:
        self._runner.run(step, parts)
        self._book(step)

    def _draft(self, mirrors: list[tuple[Mirror, int]]) -> dict[int, list[int]]:
        """Ids that may follow, by id of the sequence. `mirrors`: with the most ids of each."""
        used = {mirror.text.id for mirror, _ in mirrors}
        limits = [(self._reserve(mirror, limit, used), mirror) for mirror, limit in mirrors]
        going = sorted(((limit, mirror) for limit, mirror in limits if limit), key=lambda item: -item[0])
        if not going:
            return {}
        step = Step()
        parts: list[Tensor] = []
        for _, mirror in going:
            num = mirror.places.num_owed
            step.add(mirror.places, num)
            parts += mirror.pop(num)
        ids = self._runner.draft(step, parts, [mirror.text for _, mirror in going], [limit for limit, _ in going])
        self._book(step)
        return dict(zip((places.id for places in step.seqs), ids, strict=True))

    def _book(self, step: Step) -> None:
        """The step has been computed. Let others with the same prefix find it; without its beginning it is of no use
        to them."""
        for places, num in zip(step.seqs, step.num_tokens, strict=True):
            places.computed += num
            if not self._mirrors[places.id].base:
                self._blocks.commit(places)

    def _reserve(self, mirror: Mirror, limit: int, used: Collection[int]) -> int:
        """Blocks for its owed places and for a draft; of how many ids, at most `limit`."""
        while limit and not self._grow(mirror, mirror.places.num_owed + limit - 1, used):
            limit -= 1
        return limit

    def _grow(self, mirror: Mirror, num: int, used: Collection[int]) -> bool:
        """Blocks for its next places, if need be those of mirrors that are not in use, by id of the sequence."""
        while not self._blocks.grow(mirror.places, num):
            others = (m for m in self._mirrors.values() if m.places.blocks and m.text.id not in used)
            victim = next((m for m in others if m is not mirror), None)
            if victim is None:
                return False
            self.forget(victim.text)
        return True

    def _is_known(self, mirror: Mirror) -> bool:
        """It has not given its blocks to another."""
        return self._mirrors.get(mirror.text.id) is mirror
