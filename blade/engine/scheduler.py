"""Continuous batching over tokens owed: the loop that every policy shares, open at the one place where they differ.

A step first lets the sequences that only owe their next token go on (iteration-level scheduling, Orca, Yu et al.
2022), then spends what is left of the token budget on chunks of prompts (Sarathi, Agrawal et al. 2023), then admits
new ones.
"""

from __future__ import annotations

from bisect import insort
from typing import TYPE_CHECKING, Any

from blade.types import Step

if TYPE_CHECKING:
    from blade.config import EngineConfig
    from blade.contracts import Blocks
    from blade.types import Sequence

MAX_DEFERRED = 64  # waiting sequences looked past in one step because their prefix is just being computed


class OrderedScheduler:
    """Runs sequences in the order of `key`, smallest first; the last one gives way when blocks run out.

    A policy is a subclass with its own `key`. It may change only while a sequence waits.
    """

    def __init__(self, blocks: Blocks, config: EngineConfig) -> None:
        self.blocks = blocks
        self.max_batch_tokens = self.max_prompt_tokens = config.max_batch_tokens
        self.max_num_seqs = config.max_num_seqs
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []

    def key(self, seq: Sequence) -> Any:
        """What sequences are ordered by. First come, first served."""
        return (seq.arrival, seq.id)

    def add(self, seq: Sequence) -> None:
        insort(self.waiting, seq, key=self.key)

    def remove(self, seq: Sequence) -> None:
        for queue in (self.running, self.waiting):
            if seq in queue:
                queue.remove(seq)

    def schedule(self) -> Step:
        self._give_way()
        step, budget = Step(), self.max_batch_tokens
        decoding = [seq for seq in self.running if seq.num_owed <= 1 + len(seq.draft_ids)]
        for num_later, seq in zip(reversed(range(len(decoding))), decoding, strict=True):
            # A draft is shortened, never cut off by the budget: unverified it would be work for nothing.
            del seq.draft_ids[max(0, budget - num_later - 1) :]
            budget = self._run(seq, step, budget)
        budget = min(budget, self.max_prompt_tokens)
        prompts = [seq for seq in self.running if seq not in step.seqs and seq not in decoding]
        if prompts:  # a long prompt must hold up neither everybody's next token nor who comes before it
            budget = self._admit(step, budget, before=prompts[0])
        for seq in prompts:
            budget = self._run(seq, step, budget)
        self._admit(step, budget)
        return step

    def _run(self, seq: Sequence, step: Step, budget: int) -> int:
        """Put what fits of the sequence's owed tokens into the step; the budget that is left."""
        num_tokens = min(seq.num_owed, budget)
        if not num_tokens or seq not in self.running:
            return budget  # it may have given way to one before it
        if seq.draft_ids and not self.blocks.grow(seq, num_tokens):  # nobody gives way to a guess
            room = len(seq.blocks) * self.blocks.block_size - seq.computed
            del seq.draft_ids[max(0, room - 1) :]
            num_tokens = min(seq.num_owed, budget)
        if not self._make_room(seq, num_tokens, step):
            return budget
        step.add(seq, num_tokens)
        return budget - num_tokens

    def _give_way(self) -> None:
        """Let whoever is ordered last make room for one that waits and comes before it: not for one that waits for its
        prefix, with which it will need less."""
        first = next((seq for seq in self.waiting if seq.awaited is None), None)
        while first and self.running and self.key(first) < self.key(self.running[-1]) and not self._fits(first):
            self._preempt(self.running[-1])

    def _make_room(self, seq: Sequence, num_tokens: int, step: Step) -> bool:
        while not self.blocks.grow(seq, num_tokens):
            victim = next((v for v in reversed(self.running) if v is seq or v not in step.seqs), seq)
            if victim is seq:
                return False  # nobody behind it to give way; those in the step will finish, or take its blocks next
            self._preempt(victim)
        return True

    def _preempt(self, seq: Sequence) -> None:
        """Back to the queue; its tokens are owed again (recompute), less what the prefix cache still has by then."""
        self.blocks.release(seq)
        seq.draft_ids = []
        seq.num_preemptions += 1
        self.running.remove(seq)
        self.add(seq)

    def _admit(self, step: Step, budget: int, before: Sequence | None = None) -> int:
        """Start waiting sequences (those ordered before `before`) while they fit; the budget that is left."""
        num_deferred = 0
        while budget and num_deferred < min(len(self.waiting), MAX_DEFERRED):
            seq = self.waiting[num_deferred]
            if before is not None and self.key(seq) > self.key(before):
                break
            if not self.blocks.attach_prefix(seq):
                num_deferred += 1
                continue
            num_tokens = min(seq.num_owed, budget)
            if not self._fits(seq) or not self.blocks.grow(seq, num_tokens):
                self.blocks.release(seq)
                break
            del self.waiting[num_deferred]
            insort(self.running, seq, key=self.key)
            step.add(seq, num_tokens)
            budget -= num_tokens
        return budget

    def _fits(self, seq: Sequence) -> bool:
        """Room for all it owes and for one more block for each that runs: else it would soon push somebody out."""
        if len(self.running) >= self.max_num_seqs:
            return False
        num_blocks = -(-seq.num_owed // self.blocks.block_size)
        return not self.running or num_blocks + len(self.running) <= self.blocks.num_free
