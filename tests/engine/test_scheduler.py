"""Who runs next: budget, admission, preemption, shared prefixes, policies."""

from __future__ import annotations

import itertools

from blade import EngineConfig, SamplingParams, Sequence, Step
from blade.engine.blocks import BlockPool
from blade.engine.scheduler import OrderedScheduler
from blade_priority import PriorityScheduler

counter = itertools.count()


def make_seq(num_tokens: int, first: int = 0, priority: int = 0) -> Sequence:
    number = next(counter)
    prompt = list(range(first, first + num_tokens))
    return Sequence(number, prompt, SamplingParams(max_tokens=8), priority=priority, arrival=float(number))


def make_scheduler(
    num_blocks: int = 64, budget: int = 16, max_num_seqs: int = 8, policy: type[OrderedScheduler] = OrderedScheduler
) -> tuple[OrderedScheduler, BlockPool]:
    blocks = BlockPool(num_blocks, 4)
    return policy(blocks, EngineConfig(max_batch_tokens=budget, max_num_seqs=max_num_seqs, block_size=4)), blocks


def advance(step: Step, blocks: BlockPool) -> None:
    """Pretend to compute the step; whoever owes nothing more gets a token."""
    for seq, num_tokens in zip(step.seqs, step.num_tokens, strict=True):
        seq.computed += num_tokens
        if not seq.num_owed:
            seq.output_ids.append(1000 + seq.id)
        blocks.commit(seq)


def test_a_long_prompt_is_cut_into_chunks_and_decodes_go_first() -> None:
    scheduler, blocks = make_scheduler(budget=16)
    long, short = make_seq(40), make_seq(4, first=100)
    scheduler.add(long)
    step = scheduler.schedule()
    assert (step.seqs, step.num_tokens) == ([long], [16])
    advance(step, blocks)
    scheduler.add(short)
    advance(scheduler.schedule(), blocks)  # 16 more of the long one: no budget left
    step = scheduler.schedule()
    assert (step.seqs, step.num_tokens) == ([long, short], [8, 4])
    advance(step, blocks)
    long.prompt_ids += list(range(500, 540))  # as if it owed another long stretch
    step = scheduler.schedule()
    assert (step.seqs, step.num_tokens) == ([short, long], [1, 15])


def test_prompts_are_held_to_what_there_is_time_for_and_next_tokens_are_not() -> None:
    scheduler, blocks = make_scheduler(budget=16, max_num_seqs=6)
    for i in range(5):
        scheduler.add(make_seq(3, first=100 * i))
    advance(scheduler.schedule(), blocks)
    scheduler.add(make_seq(40, first=900))
    scheduler.max_prompt_tokens = 4
    step = scheduler.schedule()
    assert step.num_tokens == [1, 1, 1, 1, 1, 4]


def test_the_budget_and_the_number_of_sequences_are_bounds() -> None:
    scheduler, blocks = make_scheduler(budget=16, max_num_seqs=3)
    for i in range(6):
        scheduler.add(make_seq(5, first=100 * i))
    for _ in range(4):
        step = scheduler.schedule()
        assert sum(step.num_tokens) <= 16
        advance(step, blocks)
    assert (len(scheduler.running), len(scheduler.waiting)) == (3, 3)


def test_the_last_one_gives_way_and_comes_back_with_its_tokens() -> None:
    scheduler, blocks = make_scheduler(num_blocks=5, budget=32)
    first, second = make_seq(7), make_seq(7, first=100)
    for seq in (first, second):
        scheduler.add(seq)
    preempted = False
    for _ in range(8):
        step = scheduler.schedule()
        preempted |= second in scheduler.waiting
        advance(step, blocks)
        blocks.check([first, second])
    assert preempted
    assert second.num_preemptions == 1
    assert len(first.output_ids) == 8
    scheduler.remove(first)
    blocks.release(first)
    produced = list(second.output_ids)
    step = scheduler.schedule()
    assert step.seqs == [second]
    advance(step, blocks)
    assert second.output_ids[: len(produced)] == produced


def test_nobody_gives_way_to_a_draft() -> None:
    scheduler, blocks = make_scheduler(num_blocks=5, budget=32)
    first, second = make_seq(6), make_seq(5, first=100)
    for seq in (first, second):
        scheduler.add(seq)
    advance(scheduler.schedule(), blocks)  # two blocks each
    assert blocks.grow(make_seq(4), 4)  # the last one
    first.draft_ids, second.draft_ids = [1, 2, 3, 4], [5, 6, 7]
    step = scheduler.schedule()
    assert (step.seqs, step.num_tokens) == ([first, second], [2, 3])  # up to the ends of their own blocks
    assert (first.draft_ids, second.draft_ids) == ([1], [5, 6])
    assert second.num_preemptions == 0


def test_a_draft_that_finds_no_room_does_not_hold_up_its_own_sequence() -> None:
    scheduler, blocks = make_scheduler(num_blocks=2, budget=32)
    seq = make_seq(7)
    scheduler.add(seq)
    advance(scheduler.schedule(), blocks)
    seq.draft_ids = [1, 2]
    step = scheduler.schedule()
    assert (step.seqs, step.num_tokens, seq.draft_ids) == ([seq], [1], [])


def test_a_shared_prefix_is_computed_once_for_those_who_arrive_together() -> None:
    scheduler, blocks = make_scheduler(budget=64)
    seqs = [make_seq(16) for _ in range(4)]
    for i, seq in enumerate(seqs):
        seq.prompt_ids += [900 + i, 901 + i]
        scheduler.add(seq)
    step = scheduler.schedule()
    assert step.seqs == seqs[:1]
    advance(step, blocks)
    step = scheduler.schedule()
    assert step.seqs == seqs
    assert step.num_tokens == [1, 2, 2, 2]


def test_others_overtake_those_who_wait_for_a_prefix() -> None:
    scheduler, _ = make_scheduler(budget=64)
    first, same, other = make_seq(16), make_seq(16), make_seq(8, first=300)
    for seq in (first, same, other):
        scheduler.add(seq)
    assert scheduler.schedule().seqs == [first, other]
    assert scheduler.waiting == [same]


def test_priority_runs_the_urgent_first_and_pushes_out_the_least_urgent() -> None:
    scheduler, blocks = make_scheduler(num_blocks=4, budget=32, policy=PriorityScheduler)
    idle = make_seq(8, priority=5)
    scheduler.add(idle)
    advance(scheduler.schedule(), blocks)
    advance(scheduler.schedule(), blocks)  # it holds three of the four blocks now
    urgent = make_seq(4, first=100, priority=-1)
    scheduler.add(urgent)
    advance(scheduler.schedule(), blocks)
    assert (scheduler.running, scheduler.waiting) == ([urgent], [idle])
    scheduler.remove(urgent)
    blocks.release(urgent)
    step = scheduler.schedule()
    assert step.seqs == [idle]
    assert idle.computed == 8  # its full blocks were still there
    scheduler.add(make_seq(4, first=200, priority=9))
    advance(step, blocks)
    assert idle in scheduler.schedule().seqs  # a less urgent one does not push it out


def test_nobody_gives_way_to_one_whose_prefix_was_computed_meanwhile() -> None:
    scheduler, blocks = make_scheduler(num_blocks=9, budget=20)
    first, same, other = make_seq(14), make_seq(14), make_seq(4, first=300)
    for seq in (first, same, other):
        scheduler.add(seq)
    step = scheduler.schedule()
    assert step.seqs == [first, other]
    advance(step, blocks)
    step = scheduler.schedule()  # there were no four blocks for all of it, but there is one for the rest
    assert (step.seqs, step.num_tokens) == ([first, other, same], [1, 1, 2])
    assert other.num_preemptions == 0


def test_an_urgent_one_gets_room_beside_another_that_waits_for_its_prefix() -> None:
    scheduler, blocks = make_scheduler(num_blocks=10, budget=8, policy=PriorityScheduler)
    idle, owner, same = make_seq(8, first=300, priority=9), make_seq(20), make_seq(20)
    urgent = make_seq(16, first=500, priority=1)
    scheduler.add(idle)
    advance(scheduler.schedule(), blocks)
    for seq in (owner, same, urgent):
        scheduler.add(seq)
    advance(scheduler.schedule(), blocks)
    assert not blocks.attach_prefix(same)
    scheduler.schedule()
    assert same in scheduler.waiting
    assert idle in scheduler.waiting  # it has made room for the urgent one


def test_a_sequence_removed_while_waiting_is_forgotten() -> None:
    scheduler, _ = make_scheduler()
    seq = make_seq(4)
    scheduler.add(seq)
    scheduler.remove(seq)
    assert len(scheduler.schedule()) == 0


def test_the_urgent_prompt_keeps_its_blocks_and_the_others_wait() -> None:
    scheduler, blocks = make_scheduler(num_blocks=6, budget=8, policy=PriorityScheduler)
    idle = make_seq(7, first=500, priority=9)
    scheduler.add(idle)
    advance(scheduler.schedule(), blocks)
    urgent = make_seq(12, priority=0)
    scheduler.add(urgent)
    while not urgent.output_ids:
        advance(scheduler.schedule(), blocks)
    assert urgent.num_preemptions == 0


def test_an_urgent_request_does_not_wait_for_a_long_prompt() -> None:
    scheduler, blocks = make_scheduler(num_blocks=256, budget=16, policy=PriorityScheduler)
    long, urgent = make_seq(400, priority=9), make_seq(5, first=500, priority=0)
    scheduler.add(long)
    advance(scheduler.schedule(), blocks)
    scheduler.add(urgent)
    step = scheduler.schedule()
    assert (step.seqs, step.num_tokens) == ([urgent, long], [5, 11])


def test_drafts_are_shortened_so_that_everybody_gets_a_token() -> None:
    scheduler, blocks = make_scheduler(budget=8, max_num_seqs=8)
    seqs = [make_seq(2, first=100 * i) for i in range(4)]
    for seq in seqs:
        scheduler.add(seq)
    advance(scheduler.schedule(), blocks)
    for seq in seqs:
        seq.draft_ids = [1, 2, 3, 4]
    step = scheduler.schedule()
    assert (step.seqs, step.num_tokens) == (seqs, [5, 1, 1, 1])
    assert [len(seq.draft_ids) for seq in seqs] == [4, 0, 0, 0]
