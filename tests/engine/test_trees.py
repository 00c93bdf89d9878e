"""Drafts that are trees: what their rows see, which path is kept, and when a tree is worth its rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blade import Draft, Sampled, SamplingParams, Sequence, Step
from blade.engine.acceptance import Acceptance
from blade.engine.allocation import allocate_trees
from blade.engine.batch import build_batch
from blade.engine.costs import StepCosts
from blade.engine.drafting import GuardedDrafter
from blade.engine.speculation import Speculator
from blade.engine.trees import MOST_IDS, ancestors, depths, num_in_place, paths
from blade.engine.verify import accept

IDS, PARENTS = [5, 6, 7, 8, 6, 9], [-1, 0, 1, -1, 3, 4]  # 5 6 7, and 8 6 9


@st.composite
def trees(draw: st.DrawFn) -> list[int]:
    size = draw(st.integers(1, MOST_IDS))
    return [draw(st.integers(-1, i - 1)) for i in range(size)]


def make_seq(seq_id: int = 1, draft: list[int] | None = None, parents: list[int] | None = None) -> Sequence:
    params = SamplingParams(max_tokens=1000)
    seq = Sequence(seq_id, [1, 2, 3], params, output_ids=[4], computed=3, blocks=[2, 0, 1, 3])
    seq.draft_ids, seq.draft_parents = list(draft or []), parents
    return seq


@given(trees())
def test_a_row_sees_the_root_and_the_ids_of_its_path(parents: list[int]) -> None:
    ids = list(range(100, 100 + len(parents)))
    rows = [99, *ids]
    for own, bits, depth, path in zip(rows, ancestors(parents), depths(parents), paths(ids, parents), strict=True):
        assert [rows[i] for i in range(64) if bits >> i & 1] == [99, *path]
        assert len(path) == depth
        assert [99, *path][-1] == own
        assert -(2**63) <= bits < 2**63


def test_a_batch_with_a_tree_has_positions_by_depth_and_slots_by_order() -> None:
    tree, chain = make_seq(1, IDS, PARENTS), make_seq(2, [5, 6])
    batch = build_batch(Step([tree, chain], [7, 3]), 4, lambda x: x)
    assert batch.positions.tolist() == [3, 4, 5, 6, 4, 5, 6, 3, 4, 5]
    assert batch.slots.tolist() == [11, 0, 1, 2, 3, 4, 5, 11, 0, 1]
    assert batch.ancestors is not None
    assert batch.ancestors.tolist() == [1, 0b11, 0b111, 0b1111, 0b10001, 0b110001, 0b1110001, 0, 0, 0]
    assert build_batch(Step([chain], [3]), 4, lambda x: x).ancestors is None
    del tree.draft_ids[4:]  # as a scheduler does where the budget ends
    batch = build_batch(Step([tree], [5]), 4, lambda x: x)
    assert batch.positions.tolist() == [3, 4, 5, 6, 4]
    assert batch.ancestors is not None
    assert batch.ancestors.tolist() == [1, 0b11, 0b111, 0b1111, 0b10001]


@pytest.mark.parametrize(
    ("after", "kept", "in_place"),
    [
        ({-1: 5, 0: 6, 1: 7, 2: 1}, [5, 6, 7, 1], 3),
        ({-1: 5, 0: 2}, [5, 2], 1),
        ({-1: 8, 3: 6, 4: 9, 5: 2}, [8, 6, 9, 2], 0),
        ({-1: 8, 3: 1}, [8, 1], 0),
        ({-1: 6}, [6], 0),
    ],
)
def test_the_path_that_was_sampled_is_kept(after: dict[int, int], kept: list[int], in_place: int) -> None:
    sampled = [Sampled(after.get(node, 77)) for node in range(-1, len(IDS))]
    result = accept(IDS, sampled, PARENTS)
    assert isinstance(result, list)
    assert [token.token_id for token in result] == kept
    assert num_in_place(make_seq(1, IDS, PARENTS), kept) == in_place


def test_only_what_failed_on_the_path_counts() -> None:
    failed = ValueError()
    sampled: list[Sampled | Exception] = [Sampled(5), Sampled(1), failed, Sampled(1), failed, Sampled(1), Sampled(1)]
    assert accept(IDS, sampled, PARENTS) == [Sampled(5), Sampled(1)]
    sampled[0] = Sampled(8)
    assert accept(IDS, sampled, PARENTS) is failed


def test_a_tree_is_judged_by_how_far_the_text_followed_it() -> None:
    for said, right in (([8, 6, 1], 2), ([5, 1], 1), ([1], 0), ([5, 6, 7, 1], 3)):
        acceptance, seq = Acceptance(), make_seq()
        acceptance.watch(seq, Draft(IDS, 2, "a", PARENTS))
        for token in said:
            seq.output_ids.append(token)
            acceptance.look(seq)
        assert (acceptance._pools["a", 2].accepted, acceptance._pools["a", 2].judged) == (right, 1)
        assert not acceptance._watched


def test_trees_are_taken_whole_while_that_pays() -> None:
    assert allocate_trees([(4, 2.0), (4, 0.1)], 0, 2.0, lambda num: 1 + 0.1 * num, 99) == [True, False]
    assert allocate_trees([(4, 2.0)], 0, 1.0, lambda num: 1 + 0.6 * num, 99) == [False]
    assert allocate_trees([(4, 2.0)], 4, 1.0, lambda num: 1.0, 7) == [False]


class Trees:
    """contracts.TreeDrafter with the same tree every time."""

    trees = True
    tree_size = len(IDS)

    def __init__(self, parents: list[int] = PARENTS) -> None:
        self.parents = parents

    def propose(self, seqs: list[Sequence], limits: list[int]) -> list[Draft]:
        return [Draft(IDS[:limit], parents=self.parents[:limit]) for limit in limits]

    def sampled(self, seq: Sequence, ids: list[int]) -> None: ...

    def forget(self, seq: Sequence) -> None: ...


def test_trees_are_verified_while_they_come_true_and_no_longer() -> None:
    speculator = Speculator([GuardedDrafter("trees", Trees(), 100)], StepCosts({1: 1.0, 7: 1.6}), 2, 10_000)
    seq, sizes = make_seq(), []
    for says in ([8, 6, 9, 1], [1]):
        for _ in range(60):
            speculator.draft([seq], False)
            num_drafted, seq.draft_ids = len(seq.draft_ids), []
            new = says if num_drafted else says[:1]
            for token in new if num_drafted else says[:]:
                seq.output_ids.append(token)
            speculator.stepped(1, 1 + num_drafted, 1.0 + 0.1 * num_drafted)
            if num_drafted:
                speculator.verified(seq, num_drafted, len(new) - 1)
            sizes.append(num_drafted)
        del seq.output_ids[1:]
    assert set(sizes) == {0, len(IDS)}  # whole or not at all
    assert sizes[50:60] == [len(IDS)] * 10
    assert sum(sizes[80:]) <= len(IDS)
    speculator = Speculator([GuardedDrafter("trees", Trees(), 100)], None, 2, 10_000)
    seq.params = SamplingParams(max_tokens=len(seq.output_ids) + 4)
    speculator.draft([seq], False)
    assert (seq.draft_ids, seq.draft_parents) == (IDS[:3], PARENTS[:3])  # there is room for no more


@pytest.mark.parametrize("parents", [[-1, 0, 1], [-1, 1, 1, 1, 1, 1], [-2, 0, 0, 0, 0, 0]])
def test_what_is_no_tree_turns_the_drafter_off(parents: list[int], caplog: pytest.LogCaptureFixture) -> None:
    drafter = GuardedDrafter("trees", Trees(parents), 100)
    assert drafter.propose([make_seq()], [6]) == [Draft()]
    assert "it is off from now on" in caplog.text


def test_a_tree_of_one_who_did_not_say_so_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    class Silent(Trees):
        tree_size = 0

    assert GuardedDrafter("silent", Silent(), 100).propose([make_seq()], [6]) == [Draft()]
    assert "without a tree_size" in caplog.text


def test_ids_beyond_the_vocabulary_end_a_tree() -> None:
    (draft,) = GuardedDrafter("trees", Trees(), 8).propose([make_seq()], [6])
    assert (draft.ids, draft.parents) == (IDS[:3], PARENTS[:3])


def test_no_row_of_a_plain_step_knows_of_trees() -> None:
    batch = build_batch(Step([make_seq(1, [], PARENTS)], [1]), 4, lambda x: x)  # parents of a draft that has gone
    assert batch.ancestors is None
    assert torch.equal(batch.positions, torch.tensor([3]))
