"""Verification of drafts: keep what the model would have said anyway."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from blade.types import Sampled


def accept(draft_ids: list[int], sampled: Seq[Sampled | Exception]) -> list[Sampled] | Exception:
    """The sampled tokens up to and with the first that the draft did not foresee.

    Each row was sampled from the model's own distribution given the tokens before it, with a random number that
    depends on the position alone. So what is kept is, token for token, what would have been sampled without a draft:
    lossless for every setting, with the acceptance of rejection sampling for a draft without probabilities
    (Leviathan et al. 2023, where q is one-hot).
    """
    kept: list[Sampled] = []
    for i, token in enumerate(sampled):
        if isinstance(token, Exception):
            return token
        kept.append(token)
        if i == len(draft_ids) or token.token_id != draft_ids[i]:
            break
    return kept
