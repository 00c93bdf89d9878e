"""Stop strings in a text while it comes: the automaton of Aho and Corasick (1975), one step per character."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence


class StopTable:
    """The automaton of some stop strings, none of them empty. It keeps no state: many texts can share one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._next: list[dict[str, int]] = [{}]  # node -> char -> node; a node is a prefix of a stop, 0 the empty one
        self.depth = [0]  # node -> length of its prefix
        self.match: list[str | None] = [None]  # node -> the longest stop that is a suffix of its prefix
        for stop in stops:
            self._add(stop)
        self._fallback = [0] * len(self._next)  # node -> the longest of its proper suffixes that is a node
        self._link()

    def step(self, node: int, char: str) -> int:
        while node and char not in self._next[node]:
            node = self._fallback[node]
        return self._next[node].get(char, 0)

    def _add(self, stop: str) -> None:
        node = 0
        for char in stop:
            if char not in self._next[node]:
                self._next[node][char] = len(self._next)
                self._next.append({})
                self.depth.append(self.depth[node] + 1)
                self.match.append(None)
            node = self._next[node][char]
        self.match[node] = stop

    def _link(self) -> None:
        """Fallbacks and inherited matches, breadth first: a node's fallback is shorter than the node."""
        queue = deque(self._next[0].values())
        while queue:
            node = queue.popleft()
            for char, child in self._next[node].items():
                fallback = self._fallback[node]
                while fallback and char not in self._next[fallback]:
                    fallback = self._fallback[fallback]
                self._fallback[child] = self._next[fallback].get(char, 0)
                self.match[child] = self.match[child] or self.match[self._fallback[child]]
                queue.append(child)


class StopStrings:
    """Lets text through up to the first stop string and holds back only what may still become one.

    The first match is the one that ends first; of several that end there, the longest. How the text is cut into
    pushes makes no difference.
    """

    def __init__(self, stops: StopTable | Sequence[str], include_stop: bool = False) -> None:
        """`include_stop` lets the stop string itself through too."""
        self._include_stop = include_stop
        self._table = stops if isinstance(stops, StopTable) else StopTable(stops)
        self._node = 0
        self._held = ""  # the prefix of self._node
        self._matched: str | None = None

    def push(self, text: str) -> tuple[str, str | None]:
        """(text to emit, the stop string that ended it). After a match nothing more comes out."""
        if self._matched is not None:
            return "", self._matched
        node, seen = self._node, self._held + text
        for end, char in enumerate(text, len(self._held) + 1):
            node = self._table.step(node, char)
            if (match := self._table.match[node]) is not None:
                self._matched, self._held = match, ""
                return seen[: end if self._include_stop else end - len(match)], match
        self._node = node
        certain = len(seen) - self._table.depth[node]
        self._held = seen[certain:]
        return seen[:certain], None

    def flush(self) -> str:
        """What is held back; the text has ended without a further stop string."""
        held, self._held, self._node = self._held, "", 0
        return held
