"""Draws what speculation.py measured: ``python benchmarks/speculation_plot.py RUNS.jsonl --out docs/speculation.png``.

Each line of the file is a run's result. A panel for each number of requests at a time has a group of bars for each kind
of task, and in it a bar for each way of drafting. One request at a time is compared by time, many by the ledger
(drafts_ledger.py), as docs/speculation.md says. Later runs of the same number and kind replace earlier ones.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from speculation import CONTROL, NONE


def gains(runs: list[dict[str, Any]]) -> dict[int, dict[str, dict[str, float]]]:
    """Times as fast as without drafts, by requests at a time, kind of task and way of drafting."""
    panels: dict[int, dict[str, dict[str, float]]] = {}
    for run in runs:
        num = run["concurrency"]
        measure = "speedup" if num == 1 else "speedup_by_ledger"
        for kind, ways in run["results"].items():
            of_kind = panels.setdefault(num, {}).setdefault(kind, {})
            of_kind.update({way: row[measure] for way, row in ways.items() if way not in (NONE, CONTROL)})
    return dict(sorted(panels.items()))


def draw(panels: dict[int, dict[str, dict[str, float]]], file: Path, title: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.5 + 2 * len(panels), 3), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    order = list(dict.fromkeys(kind for kinds in panels.values() for kind in kinds))
    ways = list(dict.fromkeys(way for kinds in panels.values() for gains in kinds.values() for way in gains))
    for axis, (num, kinds) in zip(axes, panels.items(), strict=True):
        shown = [kind for kind in order if kind in kinds]
        names = [way for way in ways if any(way in gains for gains in kinds.values())]
        width = 0.8 / len(names)
        for i, name in enumerate(names):
            bars = [(at, kinds[kind][name]) for at, kind in enumerate(shown) if name in kinds[kind]]
            places = [at + (i - (len(names) - 1) / 2) * width for at, _ in bars]
            axis.bar(places, [gain for _, gain in bars], width, label=name, color=f"C{ways.index(name)}")
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_xticks(range(len(shown)), shown)
        axis.set_title(f"{num} at a time", fontsize=9)
    axes[0].set_ylabel("times as fast as without drafts")
    axes[0].legend(fontsize=8)
    figure.suptitle(title, fontsize=9)
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="files of one JSON line for each run of one model")
    parser.add_argument("--out", type=Path, required=True, help="the picture")
    options = parser.parse_args()
    runs = [json.loads(line) for file in options.runs for line in file.read_text().splitlines()]
    draw(gains(runs), options.out, ", ".join(dict.fromkeys(run["model"] for run in runs)))


if __name__ == "__main__":
    main()
