"""The slots that hold the states of recurrent layers: which belongs to whom, and which hold the state after a prefix
that somebody may ask for again.

A state is of fixed size and is overwritten as a sequence goes on, so a prefix can be taken up only where its state was
kept. A slot holds one state of all recurrent layers, and is in exactly one of three places:

    free    nothing of worth in it
    kept    held by no sequence, the state after a prefix: found through the hash of the prefix's last block, given up
            least recently used first
    used    held by one or more sequences; it may be found through a hash as well, for nobody writes to it again

A sequence holds two: the one with the state after its computed tokens, and one that its next step writes to. They
change places after the step, so nothing is ever copied, and a step that has to run again, or whose draft was rejected,
finds the state before it unharmed.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from blade.types import Sequence

PER_SEQUENCE = 2
NO_SLOT = -1


class StatePool:
    """Hands out slots to sequences and remembers the states after prefixes."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._ref_counts = [0] * num_slots
        self._hashes = [b""] * num_slots  # empty: not to be found
        self._free = deque(range(num_slots))
        self._kept: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._by_hash: dict[bytes, int] = {}
        self._holders: set[int] = set()  # ids of the sequences that hold slots
        self._passing: dict[int, int] = {}  # id of a sequence -> the slot that it has in `_by_hash` until it is further

    @property
    def num_kept(self) -> int:
        return len(self._kept)

    def find(self, block_hash: bytes) -> int:
        """The slot with the state after the prefix that ends in this block, or NO_SLOT."""
        return self._by_hash.get(block_hash, NO_SLOT)

    def attach(self, seq: Sequence, slot: int) -> None:
        """Let a sequence without slots begin with the state that `find` found."""
        self._hold(seq, slot)
        seq.state = slot
        self._passing = {owner: passed for owner, passed in self._passing.items() if passed != slot}  # it is of use

    def reserve(self, seq: Sequence) -> bool:
        """Make sure that the sequence has a slot to write to. False: there are not enough for one more sequence."""
        if seq.next_state != NO_SLOT:
            return True
        if PER_SEQUENCE * len(self._holders | {seq.id}) > self.num_slots:
            return False  # those that run already may need theirs
        slot = self._free.popleft() if self._free else self._give_up()
        self._hold(seq, slot)
        seq.next_state = slot
        return True

    def advance(self, seq: Sequence) -> None:
        """The step is over: what it wrote is the sequence's state."""
        old, seq.state, seq.next_state = seq.state, seq.next_state, NO_SLOT
        if old != NO_SLOT:
            self._let_go(old)

    def keep(self, seq: Sequence, block_hash: bytes, passing: bool) -> None:
        """Make the sequence's state findable under the hash of its last block. `passing`: only until it has a later
        one."""
        if seq.state == NO_SLOT or self._hashes[seq.state]:
            return
        if passing and (earlier := self._passing.pop(seq.id, NO_SLOT)) != NO_SLOT:
            self.forget(self._hashes[earlier])
        if (same := self.find(block_hash)) != NO_SLOT:
            if same in self._kept:
                self._kept.move_to_end(same)
            return
        self._by_hash[block_hash] = seq.state
        self._hashes[seq.state] = block_hash
        if passing:
            self._passing[seq.id] = seq.state

    def forget(self, block_hash: bytes) -> None:
        """Nobody will find this prefix again."""
        slot = self._by_hash.pop(block_hash, NO_SLOT)
        if slot == NO_SLOT:
            return
        self._hashes[slot] = b""
        self._passing = {owner: passed for owner, passed in self._passing.items() if passed != slot}
        if slot in self._kept:
            del self._kept[slot]
            self._free.append(slot)

    def release(self, seq: Sequence) -> None:
        """Take all slots from the sequence; states that can be found stay while there is room."""
        for slot in (seq.state, seq.next_state):
            if slot != NO_SLOT:
                self._let_go(slot)
        seq.state = seq.next_state = NO_SLOT
        self._holders.discard(seq.id)
        self._passing.pop(seq.id, None)

    def check(self, live: Iterable[Sequence] = ()) -> None:
        """Raise RuntimeError unless the books agree with each other and with the sequences that hold slots."""
        held, owners = [0] * self.num_slots, set()
        for seq in live:
            if (seq.computed > 0) != (seq.state != NO_SLOT):
                raise RuntimeError("state pool: a sequence has computed tokens and no state, or a state of none")
            for slot in (seq.state, seq.next_state):
                if slot != NO_SLOT:
                    held[slot] += 1
                    owners.add(seq.id)
        if held != self._ref_counts or owners != self._holders:
            raise RuntimeError("state pool: reference counts differ from what the live sequences hold")
        used = {slot for slot, count in enumerate(self._ref_counts) if count}
        places = [*self._free, *self._kept, *used]
        if len(places) != self.num_slots or len(set(places)) != self.num_slots:
            raise RuntimeError("state pool: free + kept + used is not the total")
        named = {slot: block_hash for slot, block_hash in enumerate(self._hashes) if block_hash}
        if named != {slot: block_hash for block_hash, slot in self._by_hash.items()}:
            raise RuntimeError("state pool: a hash leads to a slot that does not carry it")
        if not set(self._kept) <= set(named) or not set(self._passing.values()) <= set(named):
            raise RuntimeError("state pool: a state is kept that cannot be found")

    def _hold(self, seq: Sequence, slot: int) -> None:
        self._kept.pop(slot, None)
        self._ref_counts[slot] += 1
        self._holders.add(seq.id)

    def _let_go(self, slot: int) -> None:
        self._ref_counts[slot] -= 1
        if self._ref_counts[slot] == 0:
            if self._hashes[slot]:
                self._kept[slot] = None
            else:
                self._free.append(slot)

    def _give_up(self) -> int:
        """The kept state that was not asked for longest; the slot is free."""
        self.forget(self._hashes[next(iter(self._kept))])
        return self._free.popleft()
