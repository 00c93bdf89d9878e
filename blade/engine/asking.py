"""Whom to ask a drafter for, and for how many tokens: asking takes time as well."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blade.engine.allocation import allocate
from blade.engine.coming_step import NOTHING
from blade.engine.turns import Turns

if TYPE_CHECKING:
    from blade.engine.acceptance import Acceptance
    from blade.engine.coming_step import ComingStep
    from blade.engine.drafting import GuardedDrafter
    from blade.types import Sequence

CHEAP = 0.05  # of a step: a drafter that takes no more for all sequences is asked in turns
PRIOR_CHEAP, PRIOR_PAID = 0.2, 0.75  # chances believed in at first: what is not cheap is never tried without hope
FORESIGHT = 256  # tokens that a sequence is expected to go on for at most
READING = 0.01  # of the time that a sequence takes by itself, for a cheap drafter to read its prompt
PROBE_SHARE, PROBE_TOKENS = 0.01, 2  # of the time, spent on asking a drafter that did not pay, for so few tokens

Asked = list[tuple["Sequence", int]]  # with the most tokens to draft


class Asking:
    """Of one drafter."""

    def __init__(self, drafter: GuardedDrafter, acceptance: Acceptance) -> None:
        self.drafter = drafter
        self._acceptance = acceptance
        self._turns = Turns()
        self._unasked = 0.0  # seconds of steps since it was last asked

    def choose(self, rooms: Asked, step: ComingStep, least: float) -> Asked:
        """Those of `rooms`, sequences with the most that they have room for, that asking is worth the time for. No
        token pays with a chance of `least` or below."""
        self._unasked += step.since
        asked = self._in_turns(rooms, step) if self.is_cheap(step) else self._expected_to_pay(rooms, step, least)
        if asked:
            self._unasked = 0.0
        return asked

    @property
    def goes_on(self) -> bool:
        """There are sequences that it is asked for at every step."""
        return self._turns.go_on

    def is_cheap(self, step: ComingStep) -> bool:
        return step.num_seqs * self.drafter.price.per_seq <= CHEAP * step.alone

    def chance(self, seq: Sequence, evidence: int, step: ComingStep) -> float:
        """That a token of a draft of such evidence is right, if those before it were; of a tree, how many are right."""
        prior = PRIOR_CHEAP if self.is_cheap(step) else PRIOR_PAID
        return self._acceptance.of(seq.id, (self.drafter.name, evidence), prior)

    def paid(self, seq: Sequence) -> None:
        """Something of its draft is verified."""
        self._turns.paid(seq)

    def forget(self, seq: Sequence) -> None:
        self._turns.forget(seq)
        self.drafter.forget(seq)

    def _in_turns(self, rooms: Asked, step: ComingStep) -> Asked:
        chosen = self._turns.choose(
            [seq for seq, _ in rooms], step.alone, step.since, lambda seq: self._price(seq, step)
        )
        return [item for item in rooms if item[0].id in chosen]

    def _price(self, seq: Sequence, step: ComingStep) -> float:
        """Seconds that asking for it takes, without the prompt's reading where that is nothing beside the rest."""
        price = self.drafter.price
        reading = self.drafter.num_new(seq) * price.per_new
        if not self.drafter.has_seen(seq):
            own = _num_left(seq) * step.per_seq + seq.num_tokens * step.costs.per_token
            reading = reading if reading > READING * own else 0.0
        return price.per_seq + reading

    def _expected_to_pay(self, rooms: Asked, step: ComingStep, least: float) -> Asked:
        offers = [NOTHING] * step.num_seqs
        for i, (seq, room) in enumerate(rooms):
            chance = min(1.0, self.chance(seq, 0, step))
            if chance > least and self._repays(seq, room, chance, step):
                offers[i] = (room, chance)
        taken = step.allocate(offers, self.drafter.price.per_depth)
        asked = [(seq, limit) for (seq, _), limit in zip(rooms, taken, strict=False) if limit]
        return asked or self._try_again(rooms)

    def _repays(self, seq: Sequence, room: int, chance: float, step: ComingStep) -> bool:
        """Whether what is left of the sequence is long enough for its gains to outweigh reading it first."""
        price = self.drafter.price

        def seconds(num_tokens: int, depth: int) -> float:
            """Of a step, what this one sequence is to blame for, and of its draft."""
            return step.per_seq + step.costs.seconds(step.num_seqs + num_tokens) - step.alone + depth * price.per_depth

        (length,) = allocate([(room, chance)], seconds, room)
        expected = sum(chance**j for j in range(length + 1))
        saved = seconds(0, 0) - seconds(length, length) / expected  # per token
        return saved * _num_left(seq) > self.drafter.num_new(seq) * price.per_new

    def _try_again(self, rooms: Asked) -> Asked:
        """A few tokens of one sequence, if that takes a small share of the time since the drafter was last asked."""
        price = self.drafter.price
        seq, room = min(rooms, key=lambda item: self.drafter.num_new(item[0]))
        seconds = PROBE_TOKENS * price.per_depth + self.drafter.num_new(seq) * price.per_new
        return [(seq, min(room, PROBE_TOKENS))] if seconds < PROBE_SHARE * self._unasked else []


def _num_left(seq: Sequence) -> int:
    """Tokens that the sequence is expected to go on for."""
    return min(seq.params.max_tokens - len(seq.output_ids), FORESIGHT)
