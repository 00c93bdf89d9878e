"""A suffix automaton over token ids: where has the end of a text been before?

Built online in amortised constant time per token (Blumer et al. 1985, "The smallest automaton recognizing the subwords
of a text"). A state stands for all substrings that end at the same places; its link leads to the longest of their
suffixes that ends in more places.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable

ROOT = 0


class SuffixAutomaton:
    """All substrings of a growing text, some 100 bytes per token."""

    def __init__(self) -> None:
        self.text = array("i")
        # After `append`: the longest suffix of the text that occurs earlier, and where that ends (the latest time it
        # was found at the end of the text; the first, if never).
        self.match_length = 0
        self.match_end = -1
        self._length = array("i", [0])  # of a state's longest substring
        self._link = array("i", [-1])
        self._end = array("i", [-1])  # where an occurrence of the state's substrings ends
        # Most states have one way on: (token << 32 | target). Others have a dict, dead ends None.
        self._ways: list[int | dict[int, int] | None] = [None]
        self._last = ROOT

    def __len__(self) -> int:
        return len(self.text)

    def append(self, token: int) -> None:
        """Extend the text by a token id, at least 0."""
        self.text.append(token)
        place = len(self.text) - 1
        new = self._add_state(self._length[self._last] + 1, place, None)
        state = self._last
        while state >= 0 and self._step(state, token) < 0:
            self._set(state, token, new)
            state = self._link[state]
        self._link[new] = self._suffix_of(state, token) if state >= 0 else ROOT
        self._last = new
        self._remember(self._link[new], place)

    def find(self, tokens: Iterable[int]) -> tuple[int, int]:
        """(length, end) of the longest suffix of `tokens` that occurs in the text, and where it does; (0, -1): none."""
        state, length = ROOT, 0
        for token in tokens:
            while state != ROOT and self._step(state, token) < 0:
                state = self._link[state]
                length = self._length[state]
            if (target := self._step(state, token)) >= 0:
                state, length = target, length + 1
        return (length, self._end[state]) if length else (0, -1)

    def after(self, end: int, num_tokens: int) -> list[int]:
        """Up to `num_tokens` tokens that followed the place `end`; past the end of the text the same distance back."""
        tokens = self.text[end + 1 : end + 1 + num_tokens].tolist()
        distance = len(self.text) - end - 1
        while tokens and len(tokens) < num_tokens:
            tokens.append(tokens[len(tokens) - distance])
        return tokens

    def _suffix_of(self, state: int, token: int) -> int:
        """The state of the longest earlier substring that goes from `state` over `token`, split off if it shares one
        with longer ones."""
        target = self._step(state, token)
        if self._length[target] == self._length[state] + 1:
            return target
        ways = self._ways[target]
        clone = self._add_state(
            self._length[state] + 1, self._end[target], dict(ways) if isinstance(ways, dict) else ways
        )
        self._link[clone] = self._link[target]
        self._link[target] = clone
        while state >= 0 and self._step(state, token) == target:
            self._set(state, token, clone)
            state = self._link[state]
        return clone

    def _remember(self, state: int, place: int) -> None:
        if state == ROOT:
            self.match_length, self.match_end = 0, -1
        else:
            self.match_length, self.match_end = self._length[state], self._end[state]
            self._end[state] = place

    def _add_state(self, length: int, end: int, ways: int | dict[int, int] | None) -> int:
        self._length.append(length)
        self._link.append(-1)
        self._end.append(end)
        self._ways.append(ways)
        return len(self._ways) - 1

    def _step(self, state: int, token: int) -> int:
        """The state after `token`, or -1."""
        ways = self._ways[state]
        if ways is None:
            return -1
        if isinstance(ways, int):
            return ways & 0xFFFFFFFF if ways >> 32 == token else -1
        return ways.get(token, -1)

    def _set(self, state: int, token: int, target: int) -> None:
        ways = self._ways[state]
        if isinstance(ways, dict):
            ways[token] = target
        elif ways is None or ways >> 32 == token:
            self._ways[state] = token << 32 | target
        else:
            self._ways[state] = {ways >> 32: ways & 0xFFFFFFFF, token: target}
