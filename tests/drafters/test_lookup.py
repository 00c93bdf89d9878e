"""Drafters that copy: from the sequence itself, and from earlier replies."""

from typing import Any

import pytest

from blade import Draft, EngineConfig, SamplingParams, Sequence
from blade_ngram import NgramDrafter
from blade_suffix import drafter as suffix
from blade_suffix.drafter import Pool, SuffixDrafter

PARAMS = SamplingParams(max_tokens=100)


def make_seq(seq_id: int, prompt: list[int], output: list[int], namespace: bytes = b"") -> Sequence:
    return Sequence(seq_id, prompt, PARAMS, output_ids=output, namespace=namespace)


def ngram() -> NgramDrafter:
    return NgramDrafter(EngineConfig(), None)


def one(drafter: Any, seq: Sequence, limit: int = 4) -> Draft:
    (draft,) = drafter.propose([seq], [limit])
    assert isinstance(draft, Draft)
    return draft


@pytest.mark.parametrize("make", [ngram, SuffixDrafter])
def test_the_text_goes_on_as_it_did_before(make: Any) -> None:
    drafter = make()
    seq = make_seq(1, [1, 2, 3, 4, 5, 6, 7, 8, 9], [2, 3])
    assert one(drafter, seq).ids == [4, 5, 6, 7]
    seq.output_ids.append(4)
    assert one(drafter, seq, 2).ids == [5, 6]
    seq.output_ids.append(50)
    assert one(drafter, seq).ids == []


@pytest.mark.parametrize("make", [ngram, SuffixDrafter])
def test_a_longer_match_is_better_evidence(make: Any) -> None:
    drafter = make()
    seq = make_seq(1, [1, 2, 3, 4, 9, 2, 3, 8, 7], [2, 3])
    weak = one(drafter, seq)
    assert weak.ids[0] == 8  # the later one of two places
    other = make_seq(2, [0, 1, 2, 3, 4, 9, 2, 3, 8, 7], [0, 1, 2, 3])
    strong = one(drafter, other)
    assert strong.ids[0] == 4
    assert strong.evidence > weak.evidence


@pytest.mark.parametrize("make", [ngram, SuffixDrafter])
def test_each_sequence_has_its_own_text(make: Any) -> None:
    drafter = make()
    seqs = [make_seq(1, [1, 2, 3, 4], [1, 2]), make_seq(2, [1, 2, 7, 8], [1, 2]), make_seq(3, [5, 6], [1, 2])]
    assert [draft.ids[:2] for draft in drafter.propose(seqs, [2, 2, 2])] == [[3, 4], [7, 8], []]


def test_a_long_prompt_is_taken_in_over_several_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suffix, "TOKENS_PER_CALL", 10)
    drafter = SuffixDrafter()
    seq = make_seq(1, list(range(25)), [3, 4])
    assert [one(drafter, seq).ids for _ in range(3)] == [[], [], [5, 6, 7, 8]]


@pytest.mark.parametrize("tokens_per_call", [2, 3, 100])
def test_a_clients_prediction_is_looked_at_as_well(tokens_per_call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suffix, "TOKENS_PER_CALL", tokens_per_call)
    drafter = SuffixDrafter()
    seq = make_seq(1, [50, 51], [10, 11])
    seq.prediction_ids = [10, 11, 12, 13, 14]
    drafts = [one(drafter, seq, 2).ids for _ in range(6)]
    assert drafts[-1] == [12, 13]
    seq.output_ids += [12, 40, 13]
    assert [one(drafter, seq, 2).ids for _ in range(3)][-1] == [14, 50]


def test_earlier_replies_help_the_same_tenant_alone() -> None:
    drafter = SuffixDrafter()
    drafter.forget(make_seq(1, [99], [1, 2, 3, 4, 5], b"a"))
    mine, theirs = make_seq(2, [50], [2, 3], b"a"), make_seq(3, [50], [2, 3], b"b")
    assert [draft.ids for draft in drafter.propose([mine, theirs], [2, 2])] == [[4, 5], []]


def test_the_pool_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suffix, "TOKENS_OF_POOL", 20)
    monkeypatch.setattr(suffix, "MAX_POOLS", 3)
    pool = Pool()
    for turn in range(30):
        pool.add([turn * 10 + i for i in range(8)])
        assert sum(map(len, pool.halves)) <= 40
    assert pool.draft([291, 292], 2) == (2, [293, 294])
    assert pool.draft([1, 2], 2) == (0, [])
    pool.add(list(range(1000, 1100)))
    assert len(pool.halves[0]) == 20
    drafter = SuffixDrafter()
    for turn in range(10):
        drafter.forget(make_seq(turn, [9], [1, 2], bytes([turn])))
    assert list(drafter._pools) == [b"\x07", b"\x08", b"\x09"]


@pytest.mark.parametrize("make", [ngram, SuffixDrafter])
def test_nothing_is_kept_of_sequences_that_ended(make: Any) -> None:
    drafter = make()
    seqs = [make_seq(i, [1, 2, 3, 4], [1, 2]) for i in range(5)]
    drafter.propose(seqs, [2] * 5)
    for seq in seqs:
        drafter.forget(seq)
    kept = drafter._indexes if isinstance(drafter, NgramDrafter) else drafter._own
    assert not kept
