"""How the rows of a step are drawn: alike ones together, and all results fetched from the device at once."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch

from blade.engine import tiles
from blade.engine.transfer import send
from blade.engine.truncation import ALL, draw_from_all, draw_from_top, more_than

if TYPE_CHECKING:
    from collections.abc import Iterable
    from collections.abc import Sequence as Seq

    from torch import Tensor

    from blade.engine.logprobs import RawLogprobs
    from blade.engine.truncation import Settings
    from blade.types import SamplingParams


class Way(NamedTuple):
    """How a row is drawn; rows of one way share their passes over the vocabulary."""

    size: int  # how many of the most likely tokens are looked at; 1: greedy; 0: none, nothing is truncated
    whole: bool = False  # top_p is a share of all tokens, not of the top k


GREEDY, UNTRUNCATED = Way(1), Way(0)


class Drawn(NamedTuple):
    """One row's result on the host."""

    token_id: int
    peak: float  # its largest logit; not finite when there was nothing to draw from
    enough: bool = True  # tokens were looked at


def way_of(params: SamplingParams, vocab_size: int) -> Way:
    if params.temperature == 0 or params.top_k == 1 or params.top_p * vocab_size <= 1:
        return GREEDY
    if params.top_k == 0 and params.top_p == 1 and params.min_p == 0:
        return UNTRUNCATED
    return Way(more_than(params.top_k), whole=params.top_k == 0 and params.top_p < 1)


Lines = list[list[float]]  # of RawLogprobs.columns


def draw(x: Tensor, ways: Seq[Way], settings: Settings, raw: RawLogprobs | None) -> tuple[list[Drawn], Lines]:
    """A token for each row of logits x [R, W], which are divided by their temperatures, and the lines of `raw.columns`
    for these tokens: contracts.Ops.draw in torch.

    One copy to the host, and one more for each time that some row's truncation turns out to keep more than the
    candidates looked at.
    """
    draws = Draws(x, ways, settings)
    return draws.finish(*_fetch(draws.table, raw), raw)


class Draws:
    """`draw` in two halves: what is looked at first, and, once that is on the host, whatever else has to be."""

    def __init__(self, x: Tensor, ways: Seq[Way], settings: Settings) -> None:
        """Waits for nothing. `table` [R, 3] float64 on the device: a line is a Drawn. x has to stay as it is left."""
        _apply_temperatures(x, settings)
        self._x, self._settings = x, settings
        self._peaks = tiles.peaks(x)  # [R, W / TILE]
        self.table = torch.ones(len(x), 3, dtype=torch.float64, device=x.device)
        self.table[:, 1] = self._peaks.amax(-1)
        self._groups = _grouped(enumerate(ways))
        self._look()

    def _look(self) -> None:
        for way, members in self._groups.items():
            rows, ids, enough = _draw_some(way, members, self._x, self._peaks, self._settings)
            self.table[rows, 0], self.table[rows, 2] = ids.double(), enough.double()

    def finish(self, drawn: list[Drawn], lines: Lines, raw: RawLogprobs | None = None) -> tuple[list[Drawn], Lines]:
        """`drawn`, `lines`: of the table as it was made."""
        while again := [i for i, row in enumerate(drawn) if not row.enough and math.isfinite(row.peak)]:
            way_at = {i: way for way, members in self._groups.items() for i in members}
            self._groups = _grouped((i, way_at[i]._replace(size=more_than(way_at[i].size))) for i in again)
            self._look()
            drawn, lines = _fetch(self.table, raw)
        return drawn, lines


def fetch(peaks: Tensor, ids: Tensor, raw: RawLogprobs | None) -> tuple[list[Drawn], Lines]:
    """As `draw`, of what an op has drawn, [R] each."""
    if raw is None and ids.is_cpu:  # nothing is to be copied
        return [Drawn(*row) for row in zip(ids.tolist(), peaks.tolist(), strict=True)], []
    return _fetch(torch.stack((ids.double(), peaks.double()), 1), raw)


def guess(x: Tensor, ways: Seq[Way], settings: Settings) -> Tensor:
    """As `draw`, but ids [R] alone, which stay on the device: from the candidates that are looked at first, whether
    these were enough or not. Where there is nothing to draw from it is any id below W."""
    _apply_temperatures(x, settings)
    peaks = tiles.peaks(x)
    found = torch.empty(len(x), dtype=torch.int64, device=x.device)
    for way, members in _grouped(enumerate(ways)).items():
        rows, ids, _ = _draw_some(way, members, x, peaks, settings)
        found[rows] = ids
    return found


def _grouped(ways: Iterable[tuple[int, Way]]) -> dict[Way, list[int]]:
    groups: dict[Way, list[int]] = {}
    for i, way in ways:
        groups.setdefault(way, []).append(i)
    return groups


def _draw_some(
    way: Way, members: list[int], x: Tensor, peaks: Tensor, settings: Settings
) -> tuple[Tensor, Tensor, Tensor]:
    """The `members` among the rows as a tensor, their ids, and whether the tokens looked at were enough: [len(members)]
    each."""
    rows = send(torch.tensor(members), x.device)
    some = slice(None) if len(members) == len(x) else rows  # a view where it can be, not a copy
    return rows, *_draw_alike(way, x[some], peaks[some], settings.of(rows))


def _draw_alike(way: Way, x: Tensor, peaks: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """Ids, and whether the tokens looked at were enough, both [R]."""
    if way == GREEDY:
        ids = tiles.argmax(x, peaks)
    elif way == UNTRUNCATED:
        ids = tiles.draw(torch.softmax(x, -1), settings.u)
    elif way.size == ALL:
        ids = draw_from_all(x, settings, way.whole)
    else:
        return draw_from_top(x, peaks, settings, way.size, way.whole)
    return ids, torch.ones_like(ids)


def _apply_temperatures(x: Tensor, settings: Settings) -> None:
    """0 is greedy: nothing changes which is largest."""
    given = settings.temperatures
    x.div_(torch.where(given > 0, given, 1.0)[:, None])


def _fetch(table: Tensor, raw: RawLogprobs | None) -> tuple[list[Drawn], Lines]:
    """The one copy to the host."""
    num, width = table.shape
    if raw is None:
        values, lines = table.flatten().tolist(), []
    else:
        columns = raw.columns(table[:, 0].long())
        values = torch.cat([table.flatten(), columns.flatten()]).tolist()
        rest = values[num * width :]
        lines = [rest[i : i + columns.shape[1]] for i in range(0, len(rest), columns.shape[1])]
    return read_table([values[i : i + width] for i in range(0, num * width, width)]), lines


def read_table(rows: Iterable[Seq[float]]) -> list[Drawn]:
    """Lines of `Draws.table`, or of their first two columns."""
    return [Drawn(int(token_id), peak, *map(bool, enough)) for token_id, peak, *enough in rows]
