"""Drafts that are trees (Miao et al. 2024, "SpecInfer"): several ways in which a text may go on, verified in one step.

No id of a tree comes before its parent; parents[i] is the place of the one that ids[i] follows, -1 where that is the
root, the last token that is sure. In a step the root has the first row and ids[i] row i + 1: KV is stored in that
order, positions go by depth. A chain, parents None, is a tree in which each id follows the one before it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from blade.types import Sequence

MOST_IDS = 63  # with the root a row's ancestors are the bits of one int64
ROOT = -1
SIGN = 1 << 63


def tree_of(seq: Sequence) -> list[int] | None:
    """The parents of its draft_ids, where it has any and they are a tree."""
    if seq.draft_parents is None or not seq.draft_ids:
        return None
    return seq.draft_parents[: len(seq.draft_ids)]  # a scheduler may have cut the draft


def child(ids: Seq[int], parents: Seq[int] | None, node: int, token_id: int) -> int | None:
    """The place of the id that is `token_id` and follows that at place `node`; None where there is none."""
    if parents is None:
        return node + 1 if node + 1 < len(ids) and ids[node + 1] == token_id else None
    return next((i for i in range(node + 1, len(ids)) if parents[i] == node and ids[i] == token_id), None)


def paths(ids: Seq[int], parents: Seq[int]) -> list[list[int]]:
    """Of the root and of each id in turn the ids that lead there, its own included."""
    found: list[list[int]] = [[]]
    for token_id, parent in zip(ids, parents, strict=True):
        found.append([*found[parent + 1], token_id])
    return found


def depths(parents: Seq[int]) -> list[int]:
    """Of the root, 0, and of each id in turn."""
    found = [0]
    for parent in parents:
        found.append(found[parent + 1] + 1)
    return found


def ancestors(parents: Seq[int]) -> list[int]:
    """Of the root and of each id in turn the rows that it sees, its own included, as bits (Batch.ancestors)."""
    found = [1]
    for row, parent in enumerate(parents, start=1):
        found.append(found[parent + 1] | 1 << row)
    return [bits - 2 * SIGN if bits & SIGN else bits for bits in found]


def num_in_place(seq: Sequence, token_ids: Seq[int]) -> int:
    """How many of the first `token_ids` that follow the sequence have their KV where it belongs once its draft has
    been computed: those that are the first of the draft and a chain."""
    parents = tree_of(seq)
    for i, token_id in enumerate(token_ids):
        if i == len(seq.draft_ids) or seq.draft_ids[i] != token_id or (parents and parents[i] != i - 1):
            return i
    return len(token_ids)
