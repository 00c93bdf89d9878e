"""From logits to tokens, for all rows of a step at once.

Every row depends on its own logits, its seed, its position and the tokens before it, and on nothing else in the batch.
So a seed gives the same text whatever runs beside it, and whether or not a drafter helped.
"""

from __future__ import annotations

import logging
import math
import secrets
from typing import TYPE_CHECKING

import torch

from blade.engine import tiles
from blade.engine.drawing import GREEDY, Drawn, Draws, Lines, Way, draw, fetch, guess, read_table, way_of
from blade.engine.edits import LogitEdits, Row, is_edited
from blade.engine.logprobs import RawLogprobs, read_line
from blade.engine.transfer import Later
from blade.engine.truncation import ALL, Settings
from blade.engine.uniforms import uniforms
from blade.types import Sampled

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from torch import Tensor

    from blade.contracts import Ops
    from blade.types import SamplingParams, Sequence

__all__ = ["Row", "Sampler", "SamplingError"]

log = logging.getLogger("blade.engine")

COLDEST = 1e-30  # keeps logits / temperature finite; a draw is greedy far above it


class SamplingError(Exception):
    """One row cannot be sampled, through its own fault; the others are not touched."""


class Sampler:
    """Samples rows of logits: penalties, logit_bias, processors, min_tokens; temperature, top_k, top_p, min_p; then one
    uniform number per row, by inverse transform."""

    def __init__(self, vocab_size: int, ops: Ops, secret: int | None = None) -> None:
        """`secret` seeds the requests that bring no seed; drawn afresh unless given."""
        self.vocab_size = vocab_size
        self.ops = ops
        self.device = ops.device
        self._secret = secrets.randbits(64) if secret is None else secret
        self._edits = LogitEdits(vocab_size)

    def sample(self, logits: Tensor, rows: Seq[Row]) -> list[Sampled | SamplingError]:
        """One result per row of logits [R, V] float32, which may be overwritten.

        The same call again gives the same results: all that is kept between calls follows from the sequences' tokens.
        """
        ways, asked = self._ways(rows), [row.seq.params.logprobs for row in rows]
        x = logits.contiguous()
        reported = [i for i, num_top in enumerate(asked) if num_top is not None]
        most = max(num_top or 0 for num_top in asked)
        raw = RawLogprobs(self.ops, x, reported, most, self.is_plain(rows)) if reported else None
        failed = self._edits.apply(x, rows)
        drawn, lines = self._draw(x, ways, rows, raw)
        line_of = dict(zip(reported, lines, strict=True))
        return [self.result(row.seq, drawn[i], line_of.get(i), failed.get(i)) for i, row in enumerate(rows)]

    def begin(self, logits: Tensor, rows: Seq[Row], drawn: Seq[Tensor] = ()) -> BegunSampling:
        """As `sample`, of rows that are `is_simple`, without waiting for the device. `drawn`: see LogitEdits."""
        x, ways = logits.contiguous(), self._ways(rows)
        self._edits.apply(x, rows, drawn)
        if _are_greedy(ways):
            peaks, ids = self.ops.argmax(x)
            return BegunSampling(self, rows, torch.stack((ids.double(), peaks.double()), 1))
        padded = tiles.pad(x)
        # Those of the next step may be written to the same place before this one is finished.
        own = padded.clone() if padded.data_ptr() == logits.data_ptr() else padded
        draws = Draws(own, ways, self._settings(ways, rows))
        return BegunSampling(self, rows, draws.table, draws)

    def guess(self, logits: Tensor, rows: Seq[Row], drawn: Seq[Tensor] = ()) -> Tensor:
        """What `sample` would find, most of the time, without waiting for the device: ids [R] int64 that stay there. A
        draft's: where the tokens that are looked at first are not enough, it is one of these all the same, and where
        there is none to sample, any. `drawn`: what was guessed after all that the rows know of (see LogitEdits)."""
        x, ways = logits.contiguous(), self._ways(rows)
        self._edits.apply(x, rows, drawn)
        if _are_greedy(ways):
            ids = self.ops.argmax(x)[1]
        else:
            settings = self._settings(ways, rows)
            found = self._by_op(x, settings)
            ids = guess(tiles.pad(x), ways, settings) if found is None else found[1]
        return ids.clamp_(max=self.vocab_size - 1)

    def is_plain(self, rows: Seq[Row]) -> bool:
        """Whether each is drawn by its largest logit alone, as the model leaves it."""
        return _are_greedy(self._ways(rows)) and not any(is_edited(row.seq.params) for row in rows)

    def is_simple(self, params: SamplingParams) -> bool:
        """Whether `begin` covers the rows of such a request: nothing on the host has to see its logits."""
        return params.logprobs is None and not params.processors

    def forget(self, seq: Sequence) -> None:
        """The sequence has ended."""
        self._edits.forget(seq)

    def _ways(self, rows: Seq[Row]) -> list[Way]:
        return [way_of(row.seq.params, self.vocab_size) for row in rows]

    def _draw(self, x: Tensor, ways: Seq[Way], rows: Seq[Row], raw: RawLogprobs | None) -> tuple[list[Drawn], Lines]:
        if _are_greedy(ways):
            return fetch(*self.ops.argmax(x), raw)
        settings = self._settings(ways, rows)
        found = self._by_op(x, settings)
        return draw(tiles.pad(x), ways, settings, raw) if found is None else fetch(*found, raw)

    def _by_op(self, x: Tensor, settings: Settings) -> tuple[Tensor, Tensor] | None:
        each = settings
        return self.ops.draw(x, each.temperatures, each.top_k, each.top_p, each.min_p, each.u)

    def _settings(self, ways: Seq[Way], rows: Seq[Row]) -> Settings:
        params = [row.seq.params for row in rows]
        seqs = (row.seq for row in rows)
        seeds = (self._secret + seq.id if seq.params.seed is None else seq.params.seed for seq in seqs)
        columns = [
            [0.0 if way == GREEDY else max(p.temperature, COLDEST) for way, p in zip(ways, params, strict=True)],
            [float(p.top_k or ALL) for p in params],
            [p.top_p if p.top_p < 1 else math.inf for p in params],
            [p.min_p for p in params],
            uniforms(seeds, (row.position for row in rows)).tolist(),
        ]
        table = self.ops.to_device(torch.tensor(columns, dtype=torch.float64))
        temperatures, top_k, top_p, min_p, u = table
        return Settings(temperatures.float(), top_k.long(), top_p, min_p.float(), u)

    def result(
        self, seq: Sequence, drawn: Drawn, line: list[float] | None = None, raised: Exception | None = None
    ) -> Sampled | SamplingError:
        if raised is not None:
            log.error("a logits processor of sequence %d failed", seq.id, exc_info=raised)
            return SamplingError("a logits processor failed")
        if not math.isfinite(drawn.peak) or (line is not None and math.isnan(line[0])):
            log.error("sequence %d has no token to sample: its logits are not finite, or all forbidden", seq.id)
            return SamplingError("no token to sample")
        if line is None:
            return Sampled(drawn.token_id)
        return Sampled(drawn.token_id, *read_line(line, seq.params.logprobs or 0))


class BegunSampling:
    """Rows whose tokens are on their way to the host."""

    def __init__(self, sampler: Sampler, rows: Seq[Row], table: Tensor, draws: Draws | None = None) -> None:
        """`table`: see `read_table`; of `draws`, where it may turn out that more has to be looked at."""
        self.ids = table[:, 0].long().clamp_(max=sampler.vocab_size - 1)  # [R] on the device: of `results`, as a rule
        self._sampler, self._rows, self._draws = sampler, rows, draws
        self._copy = Later(table)

    def results(self) -> tuple[list[Sampled | SamplingError], list[bool]]:
        """What `Sampler.sample` would have said, and which of `ids` are right. Waits."""
        first = read_table(self._copy.tolist())
        drawn = first if self._draws is None else self._draws.finish(first, [])[0]
        results = [self._sampler.result(row.seq, each) for row, each in zip(self._rows, drawn, strict=True)]
        return results, [a.token_id == b.token_id for a, b in zip(first, drawn, strict=True)]


def _are_greedy(ways: Seq[Way]) -> bool:
    return all(way == GREEDY for way in ways)
