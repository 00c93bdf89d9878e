from __future__ import annotations

import time

from hypothesis import example, given, settings
from hypothesis import strategies as st

from blade.text.stop import StopStrings


def naive(text: str, stops: list[str], include_stop: bool) -> tuple[str, str | None]:
    """The first end of any stop; of several that end there the longest."""
    for end in range(1, len(text) + 1):
        matched = [stop for stop in stops if text[:end].endswith(stop)]
        if matched:
            stop = max(matched, key=len)
            return text[: end if include_stop else end - len(stop)], stop
    return text, None


def run(pieces: list[str], stops: list[str], include_stop: bool) -> tuple[str, str | None]:
    matcher, out = StopStrings(stops, include_stop), ""
    for piece in pieces:
        text, matched = matcher.push(piece)
        out += text
        if matched is not None:
            assert matcher.push("more") == ("", matched)
            assert matcher.flush() == ""
            return out, matched
    return out + matcher.flush(), None


SMALL = "ab\n"


@settings(max_examples=500)
@given(
    st.lists(st.text(SMALL, max_size=5), max_size=8),
    st.lists(st.text(SMALL, min_size=1, max_size=5), max_size=4),
    st.booleans(),
)
@example(["aa", "ab"], ["aab", "b"], False)
@example(["abab", "a"], ["ababb", "bab"], False)
def test_matches_the_naive_search(pieces: list[str], stops: list[str], include_stop: bool) -> None:
    assert run(pieces, stops, include_stop) == naive("".join(pieces), stops, include_stop)


@given(st.lists(st.text(SMALL, max_size=4)), st.lists(st.text(SMALL, min_size=1, max_size=4), min_size=1, max_size=4))
def test_holds_back_no_more_than_it_must(pieces: list[str], stops: list[str]) -> None:
    matcher, seen, out = StopStrings(stops), "", ""
    for piece in pieces:
        text, matched = matcher.push(piece)
        seen, out = seen + piece, out + text
        if matched is not None:
            return
        held = seen[len(out) :]
        needed = [n for n in range(len(seen) + 1) if any(stop.startswith(seen[len(seen) - n :]) for stop in stops)]
        assert len(held) == max(needed, default=0)


def test_across_tokens() -> None:
    matcher = StopStrings(["\nUser:"])
    assert matcher.push("Hi.\nUs") == ("Hi.", None)
    assert matcher.push("eful \nUser") == ("\nUseful ", None)
    assert matcher.push(": no") == ("", "\nUser:")


def test_without_stops_everything_passes() -> None:
    assert StopStrings([]).push("anything") == ("anything", None)


def test_linear_on_what_almost_matches() -> None:
    """The naive search takes 10^9 steps here."""
    matcher = StopStrings(["a" * 1000 + "b"])
    started = time.perf_counter()
    for _ in range(1000):
        matcher.push("a" * 1000)
    assert time.perf_counter() - started < 10
