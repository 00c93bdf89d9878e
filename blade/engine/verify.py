"""Verification of drafts: keep what the model would have said anyway."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blade.engine.trees import ROOT, child

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from blade.types import Sampled


def accept(
    draft_ids: list[int], sampled: Seq[Sampled | Exception], parents: Seq[int] | None = None
) -> list[Sampled] | Exception:
    """The sampled tokens up to and with the first that the draft did not foresee. sampled[0] follows the sequence,
    sampled[i + 1] the draft's i-th id; `parents`: of a draft that is a tree (trees.py).

    Each row was sampled from the model's own distribution given the tokens before it, with a random number that
    depends on the position alone. So what is kept is, token for token, what would have been sampled without a draft:
    lossless for every setting, with the acceptance of rejection sampling for a draft without probabilities
    (Leviathan et al. 2023, where q is one-hot).
    """
    kept: list[Sampled] = []
    node: int | None = ROOT
    while node is not None:
        token = sampled[node + 1]
        if isinstance(token, Exception):
            return token
        kept.append(token)
        node = child(draft_ids, parents, node, token.token_id)
    return kept
