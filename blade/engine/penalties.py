"""Repetition, presence and frequency penalties on the few tokens that they concern."""

from __future__ import annotations

from collections import Counter
from copy import copy
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch

from blade.engine.transfer import send

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from numpy.typing import NDArray
    from torch import Tensor

    from blade.types import SamplingParams

    Ids: TypeAlias = NDArray[np.int64]
    Floats: TypeAlias = NDArray[np.float32]


def has_penalties(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0


class TokenCounts:
    """The distinct tokens of a sequence's prompt and output, and how often each was output.

    It grows with the output, a token at a time, and never looks at the prompt again. Drafts do not enter it.
    """

    def __init__(self, prompt_ids: Seq[int]) -> None:
        self._ids: Ids = np.unique(np.asarray(prompt_ids, np.int64))
        self._counts: Floats = np.zeros(len(self._ids), np.float32)
        self._index = {token_id: i for i, token_id in enumerate(self._ids.tolist())}
        self._num_output = 0

    def copy(self) -> TokenCounts:
        """One that grows by itself; much quicker than counting again."""
        other = copy(self)
        other._ids, other._counts, other._index = self._ids.copy(), self._counts.copy(), self._index.copy()
        return other

    def update(self, output_ids: Seq[int]) -> None:
        """Count what has been added to the output since the last call."""
        for token_id in output_ids[self._num_output :]:
            i = self._index.setdefault(token_id, len(self._index))
            if i == len(self._ids):
                room = np.zeros(max(64, i), np.int64)
                self._ids = np.concatenate([self._ids, room])
                self._counts = np.concatenate([self._counts, room.astype(np.float32)])
            self._ids[i] = token_id
            self._counts[i] += 1
        self._num_output = len(output_ids)

    def after(self, draft_ids: Seq[int]) -> tuple[Ids, Floats]:
        """Distinct ids [U] and their counts [U] as if the drafts had been output."""
        num = len(self._index)
        ids, counts = self._ids[:num], self._counts[:num]
        if not draft_ids:
            return ids, counts
        drafted = Counter(draft_ids)
        counts = counts.copy()
        for token_id in drafted.keys() & self._index.keys():
            counts[self._index[token_id]] += drafted.pop(token_id)
        new_ids, new_counts = np.fromiter(drafted.keys(), np.int64), np.fromiter(drafted.values(), np.float32)
        return np.concatenate([ids, new_ids]), np.concatenate([counts, new_counts])


def penalize(
    flat: Tensor,
    starts: Seq[int],
    counts: Seq[tuple[Ids, Floats]],
    params: Seq[SamplingParams],
    drawn: Tensor | None = None,
) -> None:
    """Penalise in place, for each of N rows, the ids of counts[n] in the row that begins at starts[n] of `flat`.
    `drawn`, [N, D] int64: ids that were output after those, which only the device knows.

    First repetition, dividing what is positive and multiplying what is not (CTRL, Keskar et al. 2019, as in
    transformers), then presence and frequency, subtracting (as OpenAI documents them).
    """
    sizes = [len(ids) for ids, _ in counts]
    position = np.concatenate([ids + start for start, (ids, _) in zip(starts, counts, strict=True)])
    factor = np.repeat(np.array([p.repetition_penalty for p in params], np.float32), sizes)
    less = [n * p.frequency_penalty + (n > 0) * p.presence_penalty for p, (_, n) in zip(params, counts, strict=True)]
    index = send(torch.from_numpy(position), flat.device)
    repetition = send(torch.from_numpy(factor), flat.device)
    subtract = send(torch.from_numpy(np.concatenate(less, dtype=np.float32)), flat.device)
    logits = flat[index]
    penalized = torch.where(logits < 0, logits * repetition, logits / repetition) - subtract
    if drawn is None:
        flat[index] = penalized
        return
    places = send(torch.tensor(starts), flat.device)[:, None] + drawn
    of_drawn = _penalize_drawn(flat[places], places, position, np.concatenate([n for _, n in counts]), params)
    flat[index] = penalized
    flat[places] = of_drawn  # they may be among the others, which did not know of them


def _penalize_drawn(
    logits: Tensor, places: Tensor, known: Ids, num_known: Floats, params: Seq[SamplingParams]
) -> Tensor:
    """logits [N, D] of what was drawn, at `places`; those at `known` had been output num_known times before."""
    order = np.argsort(known)
    known = np.append(known[order], np.iinfo(np.int64).max)  # where what is larger than all is looked up
    device = places.device
    at_known = send(torch.from_numpy(known), device)
    num_at = send(torch.from_numpy(np.append(num_known[order], np.float32(0))), device)
    found = torch.searchsorted(at_known, places)
    num = torch.where(at_known[found] == places, num_at[found], 0)
    num += (places[:, :, None] == places[:, None, :]).sum(-1)
    columns = [(p.repetition_penalty, p.frequency_penalty, p.presence_penalty) for p in params]
    repetition, frequency, presence = send(torch.tensor(columns), device).unsqueeze(1).unbind(2)
    repeated = torch.where(logits < 0, logits * repetition, logits / repetition)
    return repeated - (num * frequency + presence)
