"""The suffix automaton against a search through all places."""

from hypothesis import given
from hypothesis import strategies as st

from blade_suffix.automaton import SuffixAutomaton

TEXTS = st.lists(st.integers(0, 3), max_size=40)


def earlier(text: list[int]) -> tuple[int, set[int]]:
    """The length of the longest suffix that occurs earlier, and where it ends."""
    for length in range(len(text) - 1, 0, -1):
        ends = {end for end in range(length - 1, len(text) - 1) if text[end - length + 1 : end + 1] == text[-length:]}
        if ends:
            return length, ends
    return 0, {-1}


@given(TEXTS)
def test_the_longest_suffix_that_occurs_earlier(text: list[int]) -> None:
    automaton = SuffixAutomaton()
    for num, token in enumerate(text, start=1):
        automaton.append(token)
        length, ends = earlier(text[:num])
        assert automaton.match_length == length
        assert automaton.match_end in ends


@given(TEXTS, TEXTS)
def test_finding_another_texts_suffix(text: list[int], other: list[int]) -> None:
    automaton = SuffixAutomaton()
    for token in text:
        automaton.append(token)
    length, end = automaton.find(other)
    places = {
        size: {i for i in range(size - 1, len(text)) if text[i - size + 1 : i + 1] == other[-size:]}
        for size in range(1, len(other) + 1)
    }
    assert length == max((size for size, ends in places.items() if ends), default=0)
    assert end in places[length] if length else end == -1


def test_what_came_after_goes_round_where_the_text_ends() -> None:
    automaton = SuffixAutomaton()
    for token in [7, 1, 2, 3, 1, 2, 3, 1]:
        automaton.append(token)
    assert (automaton.match_length, automaton.match_end) == (4, 4)
    assert automaton.after(automaton.match_end, 7) == [2, 3, 1, 2, 3, 1, 2]
    assert automaton.after(len(automaton) - 1, 4) == []


def test_a_large_token_id_is_kept_apart_from_others() -> None:
    automaton = SuffixAutomaton()
    for token in [2**31 - 1, 5, 2**31 - 2, 5, 2**31 - 1]:
        automaton.append(token)
    assert (automaton.match_length, automaton.match_end) == (1, 0)
    assert automaton.find([2**31 - 2, 5]) == (2, 3)
