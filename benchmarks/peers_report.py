"""What a comparison adds up to: medians, the ratio to the best peer, a table, bars."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DETAILS = ("ttft_ms", "itl_ms")


@dataclass
class Cell:
    """One model, precision and workload. Figures are rates, of which more is better, or seconds."""

    model: str
    precision: str
    workload: str
    metric: str
    values: dict[str, list[float | None]] = field(default_factory=dict)  # by contender, one per round; None: failed
    details: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def add(self, name: str, value: float | None, summary: dict[str, Any]) -> None:
        self.values.setdefault(name, []).append(value)
        self.details.setdefault(name, []).append(
            {metric: summary[metric]["p50"] for metric in DETAILS} | {"cached_tokens": summary["cached_tokens"]}
        )

    def medians(self) -> dict[str, float]:
        """Of the contenders that answered every round."""
        whole = {name: [v for v in values if v is not None] for name, values in self.values.items()}
        return {name: statistics.median(v) for name, v in whole.items() if len(v) == len(self.values[name])}

    def best_peer(self) -> str | None:
        peers = {name: self._speed(median) for name, median in self.medians().items() if name != "blade"}
        return max(peers, key=lambda name: peers[name]) if peers else None

    def ratio(self) -> float | None:
        """How many times as fast as the best peer blade is; None where either is absent."""
        medians, best = self.medians(), self.best_peer()
        if best is None or "blade" not in medians:
            return None
        return round(self._speed(medians["blade"]) / self._speed(medians[best]), 3)

    def _speed(self, value: float) -> float:
        return 1 / value if self.metric.startswith("seconds") else value

    def summary(self) -> dict[str, Any]:
        figures = {"medians": self.medians(), "best_peer": self.best_peer(), "ratio": self.ratio()}
        return dataclasses.asdict(self) | figures


def table(cells: list[Cell]) -> str:
    """Markdown: a row per cell, a column per contender."""
    names = list(dict.fromkeys(name for cell in cells for name in cell.values))
    rows = [["model", "precision", "workload", "", *names, "blade / best peer"]]
    rows.append(["---"] * len(rows[0]))
    for cell in cells:
        medians = cell.medians()
        figures = [_short(medians.get(name)) for name in names]
        rows.append([cell.model, cell.precision, cell.workload, cell.metric, *figures, _short(cell.ratio())])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def draw(cells: list[Cell], file: Path) -> None:
    """Bars: a row of plots per model, a column per workload, a group of bars per precision."""
    from matplotlib.figure import Figure

    models, workloads, precisions, names = (
        list(dict.fromkeys(values))
        for values in (
            (cell.model for cell in cells),
            (cell.workload for cell in cells),
            (cell.precision for cell in cells),
            (name for cell in cells for name in cell.values),
        )
    )
    figure = Figure(figsize=(4 * len(workloads), 3 * len(models)), layout="constrained")
    grid = figure.subplots(len(models), len(workloads), squeeze=False)
    for (model, workload), axes in zip(((m, w) for m in models for w in workloads), grid.flat, strict=True):
        group = [cell for cell in cells if (cell.model, cell.workload) == (model, workload)]
        _bars(axes, group, precisions, names)
        axes.set_title(f"{model} {workload}: {group[0].metric}", fontsize=9)
    grid.flat[0].legend(fontsize=8)
    figure.savefig(file, dpi=150)


def _bars(axes: Any, cells: Iterable[Cell], precisions: list[str], names: list[str]) -> None:
    medians = {cell.precision: cell.medians() for cell in cells}
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        heights = [medians.get(precision, {}).get(name, 0) for precision in precisions]
        places = [at + (i - (len(names) - 1) / 2) * width for at in range(len(precisions))]
        axes.bar(places, heights, width, label=name)
    axes.set_xticks(range(len(precisions)), precisions)
