"""benchmarks/speculation_plot.py: which figures of which runs are drawn."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import speculation_plot  # noqa: E402

sys.path.remove(str(BENCHMARKS))


def run(num: int, **kinds: dict[str, float]) -> dict[str, Any]:
    """Of `num` requests at a time: by time all were ten times as fast as by the ledger."""
    rows = {
        kind: {way: {"speedup": 10 * gain, "speedup_by_ledger": gain} for way, gain in ways.items()}
        for kind, ways in kinds.items()
    }
    return {"model": "m", "concurrency": num, "results": rows}


RUNS = [
    run(16, edit={"none": 1, "suffix": 3}),
    run(1, edit={"none": 1, "suffix": 2, "control": 1}, chat={"none": 1, "suffix": 4}),
    run(16, edit={"ngram": 5}, chat={"suffix": 6}),
    run(1, edit={"suffix": 7}),
]


def test_runs_of_one_number_share_a_panel_and_the_later_ones_count() -> None:
    assert speculation_plot.gains(RUNS) == {
        1: {"edit": {"suffix": 70}, "chat": {"suffix": 40}},
        16: {"edit": {"suffix": 3, "ngram": 5}, "chat": {"suffix": 6}},
    }


def test_a_picture_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="drawing is optional")
    (tmp_path / "runs.jsonl").write_text("\n".join(map(json.dumps, RUNS)))
    monkeypatch.setattr(sys, "argv", ["", f"{tmp_path}/runs.jsonl", "--out", f"{tmp_path}/bars.png"])
    speculation_plot.main()
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")
