"""What a request asks to be changed in its logits before they are drawn from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np
import torch

from blade.engine.penalties import TokenCounts, has_penalties, penalize
from blade.engine.transfer import send

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from torch import Tensor

    from blade.engine.penalties import Floats, Ids
    from blade.types import SamplingParams, Sequence


class Row(NamedTuple):
    """One row of logits: what follows tokens[: position + 1] of the sequence, all of its output among them."""

    seq: Sequence
    position: int
    path: list[int] | None = None  # the drafts before it, where they are not the first ones of seq.draft_ids

    @property
    def num_output(self) -> int:
        """Output tokens, drafts included, before the one to be sampled."""
        return self.position + 1 - len(self.seq.prompt_ids)

    @property
    def draft_ids(self) -> list[int]:
        """The drafts among them."""
        if self.path is not None:
            return self.path
        return self.seq.draft_ids[: self.num_output - len(self.seq.output_ids)]


@dataclass(slots=True, frozen=True)
class Kept:
    """What is made once per sequence rather than once per step."""

    counts: TokenCounts | None
    bias_ids: Ids
    bias_values: Floats
    stop_ids: Ids


Edited: TypeAlias = tuple[int, Row, Kept]  # the number of the row comes first


class LogitEdits:
    """Changes logits in place: penalties, then logit_bias, then processors, and last what min_tokens forbids."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._kept: dict[int, Kept] = {}  # by id of the sequence
        self._prompt: tuple[Seq[int], TokenCounts] = (), TokenCounts(())  # the last one that was counted

    def forget(self, seq: Sequence) -> None:
        self._kept.pop(seq.id, None)

    def apply(self, x: Tensor, rows: Seq[Row], drawn: Seq[Tensor] = ()) -> dict[int, Exception]:
        """Edit x [R, W]. Returns what processors raised, by number of the row; these rows are spoilt. `drawn`: ids
        that follow those that the rows know of, one after the other, each [R and more] on the device; processors do
        not hear of them."""
        edited = [(i, row, self._keep(row.seq)) for i, row in enumerate(rows) if is_edited(row.seq.params)]
        if not edited:
            return {}
        _penalize(x, edited, drawn)
        _add_bias(x, edited)
        errors = {}
        for i, row, _ in edited:
            try:
                self._process(row, x[i, : self._vocab_size])
            except Exception as error:  # a plugin's code: its request alone shall feel it
                errors[i] = error
        _forbid_stopping(x, edited)
        return errors

    def _keep(self, seq: Sequence) -> Kept:
        kept = self._kept.get(seq.id)
        if kept is None:
            kept = self._kept[seq.id] = _make(seq, self._counts(seq), self._vocab_size)
        return kept

    def _counts(self, seq: Sequence) -> TokenCounts | None:
        if not has_penalties(seq.params):
            return None
        if seq.params.repetition_penalty == 1:
            return TokenCounts(())  # the other penalties are over output
        prompt_ids, counts = self._prompt
        if prompt_ids is not seq.prompt_ids:  # the choices of one request share their prompt's list
            counts = TokenCounts(seq.prompt_ids)
            self._prompt = seq.prompt_ids, counts
        return counts.copy()

    def _process(self, row: Row, logits: Tensor) -> None:
        for processor in row.seq.params.processors:
            processor([*row.seq.output_ids, *row.draft_ids], logits)


def _make(seq: Sequence, counts: TokenCounts | None, vocab_size: int) -> Kept:
    params = seq.params
    stop_ids = [token_id for token_id in params.stop_token_ids if token_id < vocab_size]  # a model's own may lie beyond
    return Kept(
        counts=counts,
        bias_ids=np.fromiter(params.logit_bias.keys(), np.int64),
        bias_values=np.fromiter(params.logit_bias.values(), np.float32),
        stop_ids=np.array(stop_ids, np.int64),
    )


def is_edited(params: SamplingParams) -> bool:
    """Whether the logits are changed before they are drawn from."""
    held_back = params.min_tokens and params.stop_token_ids
    return bool(params.logit_bias or params.processors or held_back or has_penalties(params))


def _penalize(x: Tensor, edited: Seq[Edited], drawn: Seq[Tensor]) -> None:
    lines, counts, params = [], [], []
    for i, row, kept in edited:
        if kept.counts is not None:
            kept.counts.update(row.seq.output_ids)
            lines.append(i)
            counts.append(kept.counts.after(row.draft_ids))
            params.append(row.seq.params)
    if counts:
        columns = [ids[: len(x)] for ids in drawn]
        of_lines = torch.stack(columns, 1)[_index([np.array(lines)], x.device)] if columns else None
        penalize(x.view(-1), [i * x.shape[1] for i in lines], counts, params, of_lines)


def _add_bias(x: Tensor, edited: Seq[Edited]) -> None:
    if biased := [(i, kept) for i, _, kept in edited if len(kept.bias_ids)]:
        index = _index([i * x.shape[1] + kept.bias_ids for i, kept in biased], x.device)
        values = torch.from_numpy(np.concatenate([kept.bias_values for _, kept in biased]))
        x.view(-1)[index] += send(values, x.device)


def _forbid_stopping(x: Tensor, edited: Seq[Edited]) -> None:
    early = [(i, kept) for i, row, kept in edited if row.num_output < row.seq.params.min_tokens]
    if early:
        x.view(-1)[_index([i * x.shape[1] + kept.stop_ids for i, kept in early], x.device)] = float("-inf")


def _index(parts: Seq[Ids], device: torch.device) -> Tensor:
    return send(torch.from_numpy(np.concatenate(parts)), device)
