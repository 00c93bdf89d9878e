"""The two branches of lookahead decoding, the window of guesses and the n-grams to verify, as one tree of drafts.

The window has N - 1 levels of W columns. Its first level is a chain of guesses after the last token that is sure (the
root, which is its column 0), one for each of the next places. Column i goes on from there: level l of it is a guess at
the place i + l, made l steps ago or more, and what the model says after the last level is the next guess. So each step
is one iteration of Jacobi's method on all columns, and each column with what follows it an n-gram that the model made.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq

STRIDE = 7919  # a prime: the first guesses come from all over the prompt


class Tree:
    """Draft.ids and parents; what is said twice in one place has one place in it. At most `most` ids."""

    def __init__(self, most: int) -> None:
        self.ids: list[int] = []
        self.parents: list[int] = []
        self._most = most
        self._places: dict[tuple[int, int], int] = {}

    def add(self, parent: int | None, token_id: int) -> int | None:
        """The place of the id after `parent`; None where there is no room for it, or was none for its parent."""
        if parent is None:
            return None
        place = self._places.get((parent, token_id))
        if place is None:
            if len(self.ids) == self._most:
                return None
            place = self._places[parent, token_id] = len(self.ids)
            self.ids.append(token_id)
            self.parents.append(parent)
        return place

    def add_path(self, parent: int | None, token_ids: Iterable[int]) -> int | None:
        """The place of the last."""
        for token_id in token_ids:
            parent = self.add(parent, token_id)
        return parent


class Window:
    """The guesses of one sequence."""

    def __init__(self, prompt_ids: Seq[int], num_columns: int, num_levels: int) -> None:
        numbers = range(num_columns * num_levels)
        seeds = iter([prompt_ids[i * STRIDE % len(prompt_ids)] for i in numbers])
        self._levels = [[next(seeds) for _ in range(num_columns)] for _ in range(num_levels)]

    def plant(self, tree: Tree) -> list[int | None]:
        """Add the window to the tree; the places of the columns' ends, None where there was no room."""
        chain: list[int | None] = [-1]
        for token_id in self._levels[0][1:]:
            chain.append(tree.add(chain[-1], token_id))
        return [tree.add_path(place, (level[i] for level in self._levels[1:])) for i, place in enumerate(chain)]

    def advance(self, root: int, said: Seq[int | None], num_new: int) -> list[list[int]]:
        """Take in what the model said after each column's end, None where it was not asked; the sequence has `num_new`
        tokens more by now. The n-grams that have come of it; the first begins with the root."""
        self._levels[0][0] = root
        columns = [list(column) for column in zip(*self._levels, strict=True)]
        ngrams = [[*column, new] for column, new in zip(columns, said, strict=True) if new is not None]
        last = [column[-1] if new is None else new for column, new in zip(columns, said, strict=True)]
        self._levels = [*self._levels[1:], last]
        passed = (num_new - 1) % len(said)  # those places are sure now: their columns begin anew at the other end
        self._levels = [level[passed:] + level[:passed] for level in self._levels]
        return ngrams
