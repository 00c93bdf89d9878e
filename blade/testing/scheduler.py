"""The kit for schedulers: a small engine without a model, driven over pools and budgets that are too small."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from blade.config import EngineConfig
from blade.contracts import Scheduler
from blade.engine.blocks import BlockPool
from blade.testing.require import require
from blade.types import SamplingParams, Sequence, Step

SchedulerFactory = Callable[[BlockPool, EngineConfig], Scheduler]

_SCENES = [  # (num_blocks, max_batch_tokens, max_num_seqs, prefix_cache)
    (64, 512, 64, True),  # room for all
    (64, 7, 7, True),  # chunks of prompts
    (12, 64, 64, True),  # preemption
    (12, 64, 64, False),
    (12, 5, 2, True),  # everything scarce
]
_BLOCK_SIZE = 8


def check_scheduler(factory: SchedulerFactory, seed: int = 0) -> None:
    """Every sequence is run to its end, none twice in a step, all within budget and blocks, whatever is aborted,
    drafted, shared and preempted on the way; then nothing is left behind."""
    for num_blocks, max_batch_tokens, max_num_seqs, prefix_cache in _SCENES:
        pool = BlockPool(num_blocks, _BLOCK_SIZE, prefix_cache)
        config = EngineConfig(max_batch_tokens=max_batch_tokens, max_num_seqs=max_num_seqs, block_size=_BLOCK_SIZE)
        _Run(factory(pool, config), pool, config, random.Random(seed)).check()  # noqa: S311


@dataclass
class _Run:
    scheduler: Scheduler
    pool: BlockPool
    config: EngineConfig
    rng: random.Random
    live: list[Sequence] = field(default_factory=list)

    def check(self) -> None:
        require(len(self.scheduler.schedule()) == 0, "an idle scheduler scheduled something")
        arriving = [self._sequence(i) for i in range(24)]
        for _ in range(4000):
            if arriving and self.rng.random() < 0.3:
                self.live.append(arriving.pop())
                self.scheduler.add(self.live[-1])
            if self.live and self.rng.random() < 0.02:
                self._finish(self.rng.choice(self.live))
            if self.live:
                self._step()
            elif not arriving:
                break
        require(not self.live, f"after 4000 steps {len(self.live)} sequences have not finished")
        require(not self.scheduler.waiting and not self.scheduler.running, "finished sequences are still queued")
        require(self.pool.num_used == 0, "blocks are still held when everybody has finished")

    def _sequence(self, seq_id: int) -> Sequence:
        capacity = min(160, self.pool.num_blocks * _BLOCK_SIZE)  # one sequence alone must fit
        max_tokens = self.rng.randint(1, capacity // 4)
        num_prompt = self.rng.randint(1, capacity - max_tokens)
        shared = self.rng.choice([0, 0, 1])  # two prompts, many times over: prefixes to share
        prompt = [shared] * (num_prompt - 1) + [self.rng.randint(0, 3)]
        return Sequence(seq_id, prompt, SamplingParams(max_tokens=max_tokens), priority=self.rng.randint(0, 2))

    def _step(self) -> None:
        for seq in self.scheduler.running:
            room = seq.params.max_tokens - len(seq.output_ids) - 1
            seq.draft_ids = [9] * self.rng.randint(0, min(2, room)) if seq.num_owed == 1 and room > 0 else []
        self.scheduler.max_prompt_tokens = self.rng.choice([1, 8, self.config.max_batch_tokens])
        step = self.scheduler.schedule()
        require(len(step) > 0, "sequences are waiting, yet the step is empty")
        self._check_step(step)
        for seq, num_tokens in zip(step.seqs, step.num_tokens, strict=True):
            self._commit(seq, num_tokens)
        try:
            self.pool.check(self.live)
        except RuntimeError as error:
            raise AssertionError(f"the scheduler broke the books: {error}") from error

    def _check_step(self, step: Step) -> None:
        config = self.config
        require(len(step.seqs) == len(step.num_tokens), "step.seqs and step.num_tokens differ in length")
        require(len({seq.id for seq in step.seqs}) == len(step), "a sequence is in the step twice")
        require(sum(step.num_tokens) <= config.max_batch_tokens, "the step exceeds max_batch_tokens")
        require(len(self.scheduler.running) <= config.max_num_seqs, "more than max_num_seqs run")
        queued = [seq.id for queue in (self.scheduler.running, self.scheduler.waiting) for seq in queue]
        require(sorted(queued) == sorted(seq.id for seq in self.live), "running + waiting are not those added")
        for seq, num_tokens in zip(step.seqs, step.num_tokens, strict=True):
            require(seq in self.scheduler.running, "a sequence in the step is not in `running`")
            require(0 < num_tokens <= seq.num_owed, f"{num_tokens} tokens scheduled where {seq.num_owed} are owed")
            room = len(seq.blocks) * _BLOCK_SIZE
            require(seq.computed + num_tokens <= room, "a sequence in the step lacks blocks for its tokens")
        for seq in self.scheduler.waiting:
            require(not seq.blocks and seq.computed == 0, "a waiting sequence holds blocks")

    def _commit(self, seq: Sequence, num_tokens: int) -> None:
        through = num_tokens == seq.num_owed
        accepted = self.rng.randint(0, len(seq.draft_ids)) if through else 0
        sampled = [9] * accepted + [self.rng.randint(0, 3)] if through else []
        seq.draft_ids = []
        seq.output_ids += sampled
        seq.computed = seq.num_tokens - 1 if through else min(seq.computed + num_tokens, seq.num_tokens - 1)
        self.pool.commit(seq)
        if len(seq.output_ids) >= seq.params.max_tokens:
            self._finish(seq)

    def _finish(self, seq: Sequence) -> None:
        self.live.remove(seq)
        self.scheduler.remove(seq)
        self.pool.release(seq)
