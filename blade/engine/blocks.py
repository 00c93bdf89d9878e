"""The paged KV pool: which block belongs to whom, and which blocks hold a prefix that somebody may ask for again.

A block is in exactly one of three places, so free + cached + used = total at all times:

    free    nothing of worth in it
    cached  held by no sequence, its KV still good: found through its hash, evicted least recently used first
    used    held by one or more sequences (ref_count > 0); a full one can be found through its hash as well

Blocks are found by a chained, keyed hash (each over its parent's and its own ids; paged KV after Kwon et al. 2023), and
the ids are compared on a hit: a collision can cost a miss, never a wrong answer.
"""

from __future__ import annotations

import hashlib
import secrets
from array import array
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from blade.engine.states import NO_SLOT

if TYPE_CHECKING:
    from collections.abc import Iterable

    from blade.engine.states import StatePool
    from blade.types import Sequence

MIN_GAIN = 64  # tokens that a kept state must save, for a step to be cut where it is to be kept


@dataclass(slots=True)
class Block:
    """One block's book-keeping; its KV lives with the attention backend."""

    ref_count: int = 0
    hash: bytes = b""  # empty: not to be found
    ids: list[int] = field(default_factory=list)  # of the tokens whose KV it holds, when it has a hash


class BlockPool:
    """Hands out blocks to sequences and remembers the prefixes they leave behind (contracts.Blocks).

    Where the model has recurrent layers, `states` keeps their books, and a prefix is one only up to where a state was
    kept: at the end of a prompt's full blocks, and where another prompt that began alike has parted from it.
    """

    def __init__(
        self, num_blocks: int, block_size: int, prefix_cache: bool = True, states: StatePool | None = None
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_cache = prefix_cache
        self.states = states
        self._cuts: dict[int, set[int]] = {}  # id of a sequence -> numbers of tokens after which to keep its state
        self._secret = secrets.token_bytes(32)  # hashes cannot be guessed from outside, nor made to collide
        self._blocks = [Block() for _ in range(num_blocks)]
        self._free = deque(range(num_blocks))
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._by_hash: dict[bytes, int] = {}
        self._pending: dict[bytes, int] = {}  # hash -> id of the sequence that is computing this block now
        self._hashed: tuple[list[int], bytes, list[bytes]] = [], b"", []  # the last prompt, its namespace, its hashes

    @property
    def num_free(self) -> int:
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def attach_prefix(self, seq: Sequence) -> bool:
        """Give a sequence without blocks those of its longest cached prefix; see contracts.Blocks."""
        if not self.prefix_cache:
            return True
        if seq.awaited is not None:
            block_hash, owner = seq.awaited
            if self._pending.get(block_hash) == owner:
                return False  # as before: to look at all of a long prefix in each step would take its time
            seq.awaited = None
        # The last token is never taken from the cache: its logits are what the sequence is waiting for.
        num_wanted = (seq.num_tokens - 1) // self.block_size
        self._hash_blocks(seq, num_wanted)
        found = self._longest_prefix(seq, num_wanted)
        num_known, owner = self._under_computation(seq, len(found), num_wanted)
        waits = owner != seq.id
        if self.states is not None:
            waits = not self._attach_state(seq, found, num_wanted, self.states, num_known, owner)
        if waits:
            seq.awaited = seq.block_hashes[num_known - 1], owner
            return False
        for block_id in found:
            self._hold(block_id)
        seq.blocks = found
        seq.num_committed = len(found)
        seq.computed = len(found) * self.block_size
        for block_hash in seq.block_hashes[len(found) : num_wanted]:
            self._pending.setdefault(block_hash, seq.id)
        return True

    def _under_computation(self, seq: Sequence, num_found: int, num_wanted: int) -> tuple[int, int]:
        """The blocks of its prefix that are found or being computed, and who computes the last of them: the sequence
        itself, where nobody else does. Who computes a block has all those before it."""
        num_known, owner = num_found, seq.id
        while num_known < num_wanted and seq.block_hashes[num_known] in self._pending:
            owner = self._pending[seq.block_hashes[num_known]]
            num_known += 1
        return num_known, owner

    def _attach_state(
        self, seq: Sequence, found: list[int], num_wanted: int, states: StatePool, num_known: int, owner: int
    ) -> bool:
        """Shorten the prefix `found` to where there is a state, and attach that. False as in attach_prefix: a sequence
        that computes more of the same prefix, `owner`, is asked to leave its state where the two part."""
        hashes = seq.block_hashes
        num_usable = next((n for n in range(len(found), 0, -1) if states.find(hashes[n - 1]) != NO_SLOT), 0)
        cut = num_known * self.block_size
        if owner != seq.id and (cut - num_usable * self.block_size >= MIN_GAIN or cut in self._cuts.get(owner, ())):
            self._cuts.setdefault(owner, set()).add(cut)
            return False
        cuts = {num * self.block_size for num in (num_known, num_wanted) if num > num_usable}
        self._cuts[seq.id] = {cut for cut in cuts if cut - num_usable * self.block_size >= MIN_GAIN}
        del found[num_usable:]
        if num_usable:
            states.attach(seq, states.find(hashes[num_usable - 1]))
        return True

    def chunk(self, seq: Sequence, num_tokens: int) -> int:
        """How many of the num_tokens that were scheduled for a sequence to run in one step: no more than to where its
        state is to be kept."""
        stops = [cut - seq.computed for cut in self._cuts.get(seq.id, ()) if cut > seq.computed]
        return min(num_tokens, *stops) if stops else num_tokens

    def grow(self, seq: Sequence, num_tokens: int) -> bool:
        """Make room for tokens[:computed + num_tokens], all or nothing."""
        num_missing = self.blocks_for(seq.computed + num_tokens) - len(seq.blocks)
        if num_missing > self.num_free or (self.states is not None and not self.states.reserve(seq)):
            return False
        for _ in range(num_missing):
            block_id = self._free.popleft() if self._free else self._evict()
            self._blocks[block_id].ref_count = 1
            seq.blocks.append(block_id)
        return True

    def advance(self, seq: Sequence, num_run: int, computed: int) -> None:
        """A step of num_run tokens of the sequence is over, and tokens[:computed] are sure to stay. Where a state is
        kept and some of those that ran do not, it goes back to before the step: those that stay are owed again."""
        if self.states is not None:
            if computed == seq.computed + num_run:
                self.states.advance(seq)
            else:
                computed = seq.computed
        seq.computed = computed
        self.commit(seq)
        if self.states is not None and self.prefix_cache and computed and computed % self.block_size == 0:
            passing = computed not in self._cuts.get(seq.id, ())
            self.states.keep(seq, seq.block_hashes[computed // self.block_size - 1], passing)

    def commit(self, seq: Sequence) -> None:
        """Make the sequence's newly computed full blocks findable. Only accepted tokens may count as computed."""
        if not self.prefix_cache:
            return
        num_full = seq.computed // self.block_size
        if num_full == seq.num_committed:
            return
        self._hash_blocks(seq, num_full)
        for i in range(seq.num_committed, num_full):
            block_hash, block = seq.block_hashes[i], self._blocks[seq.blocks[i]]
            self._pending.pop(block_hash, None)
            if block_hash not in self._by_hash:  # else another sequence computed the same; ours stays anonymous
                self._by_hash[block_hash] = seq.blocks[i]
                block.hash = block_hash
                block.ids = seq.tokens(i * self.block_size, (i + 1) * self.block_size)
        seq.num_committed = num_full

    def release(self, seq: Sequence) -> None:
        """Take all blocks from the sequence; full ones stay cached while there is room."""
        for block_hash in seq.block_hashes[seq.num_committed :]:
            if self._pending.get(block_hash) == seq.id:
                del self._pending[block_hash]
        for block_id in reversed(seq.blocks):  # deepest first: a prefix must outlive what builds on it
            block = self._blocks[block_id]
            block.ref_count -= 1
            if block.ref_count == 0:
                if block.hash:
                    self._cached[block_id] = None
                else:
                    self._free.append(block_id)
        seq.blocks = []
        seq.computed = 0
        seq.num_committed = 0
        self._cuts.pop(seq.id, None)
        if self.states is not None:
            self.states.release(seq)

    def check(self, live: Iterable[Sequence] = ()) -> None:
        """Raise RuntimeError unless the pool's books agree with each other and with the sequences that hold blocks."""
        live = list(live)
        if self.states is not None:
            self.states.check(live)
        held, owners = [0] * self.num_blocks, set()
        for seq in live:
            owners.add(seq.id)
            for block_id in seq.blocks:
                held[block_id] += 1
        if held != [block.ref_count for block in self._blocks]:
            raise RuntimeError("block pool: reference counts differ from what the live sequences hold")
        used = {i for i, block in enumerate(self._blocks) if block.ref_count}
        places = [*self._free, *self._cached, *used]
        if len(places) != self.num_blocks or len(set(places)) != self.num_blocks:
            raise RuntimeError("block pool: free + cached + used is not the total")
        if any(self._blocks[block_id].hash != block_hash for block_hash, block_id in self._by_hash.items()):
            raise RuntimeError("block pool: a hash leads to a block that does not carry it")
        if not owners.issuperset(self._cuts):
            raise RuntimeError("block pool: the state of a sequence that has gone is waited for")
        if not owners.issuperset(self._pending.values()):
            raise RuntimeError("block pool: blocks are said to be under computation by a sequence that has gone")

    def _longest_prefix(self, seq: Sequence, num_wanted: int) -> list[int]:
        found: list[int] = []
        for i, block_hash in enumerate(seq.block_hashes[:num_wanted]):
            block_id = self._by_hash.get(block_hash)
            if block_id is None:
                break
            if self._blocks[block_id].ids != seq.tokens(i * self.block_size, (i + 1) * self.block_size):
                break
            found.append(block_id)
        return found

    def _hash_blocks(self, seq: Sequence, num_blocks: int) -> None:
        prompt_ids, namespace, hashes = self._hashed
        is_new = not seq.block_hashes
        if is_new and prompt_ids is seq.prompt_ids and namespace == seq.namespace:  # choices share their prompt's list
            seq.block_hashes += hashes[:num_blocks]
        for i in range(len(seq.block_hashes), num_blocks):
            parent = seq.block_hashes[-1] if i else seq.namespace
            ids = array("q", seq.tokens(i * self.block_size, (i + 1) * self.block_size)).tobytes()
            # The length of the parent is fixed but for the first block's namespace, which the separator closes off.
            seq.block_hashes.append(hashlib.blake2b(parent + b"|" + ids, key=self._secret, digest_size=16).digest())
        if is_new:
            self._hashed = seq.prompt_ids, seq.namespace, seq.block_hashes[: len(seq.prompt_ids) // self.block_size]

    def _hold(self, block_id: int) -> None:
        block = self._blocks[block_id]
        if block.ref_count == 0:
            del self._cached[block_id]
        block.ref_count += 1

    def _evict(self) -> int:
        block_id, _ = self._cached.popitem(last=False)
        block = self._blocks[block_id]
        del self._by_hash[block.hash]
        if self.states is not None:
            self.states.forget(block.hash)
        block.hash, block.ids = b"", []
        return block_id
