"""benchmarks/peers.py with small servers in place of real contenders."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import peers  # noqa: E402
from load_server import Server, running  # noqa: E402
from peers_contenders import PRECISIONS, Contender, Programs, contenders  # noqa: E402
from peers_measure import FIRST_TOKEN, TOKENS_PER_SECOND, WORKLOADS, Workload, seed  # noqa: E402
from peers_report import Cell, draw, table  # noqa: E402

sys.path.remove(str(BENCHMARKS))

# What load.py asks of a server; it answers after argv[2] seconds with argv[3] tokens fewer than it was asked for.
SERVER = """
import http.server, json, sys, time
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.send_header("Content-Type", "application/json"); self.end_headers()
        self.wfile.write(b'{"data": [{"id": "small"}]}')
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        time.sleep(float(sys.argv[2]))
        self.send_response(200); self.end_headers()
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"] - int(sys.argv[3])}
        for event in ({"choices": [{"text": "x"}]}, {"choices": [], "usage": usage}):
            self.wfile.write(b"data: " + json.dumps(event).encode() + b"\\n\\n")
        self.wfile.write(b"data: [DONE]\\n\\n")
    def log_message(self, *args): pass
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def small(name: str, seconds: float, fewer: int = 0) -> Contender:
    return Contender(name, (sys.executable, "-c", SERVER, "{port}", str(seconds), str(fewer)))


def cell(metric: str, **values: list[float | None]) -> Cell:
    made = Cell("m", "bf16", "W1", metric)
    for name, figures in values.items():
        for figure in figures:
            made.add(name, figure, {"ttft_ms": {"p50": 1.0}, "itl_ms": {"p50": 2.0}, "cached_tokens": 0})
    return made


def test_more_tokens_per_second_and_fewer_seconds_are_better() -> None:
    rate = cell(TOKENS_PER_SECOND, blade=[30, 10, 20], one=[10, 10, 10], two=[5, 40, 5])
    assert (rate.medians(), rate.best_peer(), rate.ratio()) == ({"blade": 20, "one": 10, "two": 5}, "one", 2)
    wait = cell(FIRST_TOKEN, blade=[3.0], one=[1.0], two=[1.5])
    assert (wait.best_peer(), wait.ratio()) == ("one", pytest.approx(1 / 3, abs=1e-3))


def test_who_failed_a_round_has_no_figure() -> None:
    failed = cell(TOKENS_PER_SECOND, blade=[30, 10], one=[90, None], two=[5, 5])
    assert (failed.medians(), failed.best_peer(), failed.ratio()) == ({"blade": 20, "two": 5}, "two", 4)
    assert cell(TOKENS_PER_SECOND, blade=[None], one=[1]).ratio() is None
    assert cell(TOKENS_PER_SECOND, blade=[1], one=[None]).ratio() is None


def test_the_table_has_a_row_per_cell() -> None:
    rows = table([cell(TOKENS_PER_SECOND, blade=[30], one=[15]), cell(FIRST_TOKEN, one=[0.5])]).splitlines()
    assert rows[0] == "| model | precision | workload |  | blade | one | blade / best peer |"
    assert rows[2] == "| m | bf16 | W1 | output tokens/s | 30 | 15 | 2 |"
    assert rows[3] == "| m | bf16 | W1 | seconds to first token | - | 0.5 | - |"


def test_bars_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="drawing is optional")
    draw([cell(TOKENS_PER_SECOND, blade=[30], one=[15])], tmp_path / "bars.png")
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")


def test_commands_and_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "bf16.gguf").touch()
    programs = Programs(("blade",), "--log-level error", "llama-server", None, "vllm")
    blade, llama, openvino, vllm = contenders(tmp_path, PRECISIONS["bf16"], programs, [3, 5])
    assert blade.command[:4] == ("blade", "serve", "--model", f"{tmp_path}/hf")
    assert blade.command[-6:] == ("--threads", "2", "--log-level", "error", "--port", "{port}")
    assert (blade.missing, llama.missing, vllm.missing) == ("", "", "")
    assert {*zip(llama.command, llama.command[1:], strict=False)} >= {("-t", "2"), ("-m", f"{tmp_path}/bf16.gguf")}
    assert "OPENVINO_PYTHON" in openvino.missing
    assert vllm.env["VLLM_CPU_OMP_THREADS_BIND"] == "3,5"

    blade, llama, openvino, vllm = contenders(tmp_path, PRECISIONS["int8"], programs, [0])
    assert blade.command[4:6] == ("--quantize", "int8")
    assert llama.missing == f"{tmp_path}/q8_0.gguf does not exist"
    assert vllm.missing == f"{tmp_path}/w8a8 does not exist"
    assert contenders(tmp_path, PRECISIONS["int4"], programs, [0])[3].missing == "not in this precision"


def test_a_frozen_server_answers_when_it_is_thawed() -> None:
    async def status(pid: int) -> str:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0]

    async def states() -> tuple[str, str]:
        async with running(small("one", 0).command) as server:
            server.freeze()
            await asyncio.sleep(0.05)
            frozen = await status(server.group)
            server.thaw()
            await asyncio.sleep(0.05)
            thawed = await status(server.group)
            server.freeze()  # and it is stopped all the same
        return frozen, thawed

    frozen, thawed = asyncio.run(states())
    assert frozen == "T"
    assert thawed in "SR"


def test_a_comparison(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hf").symlink_to(tiny_llama)
    broken = Contender("broken", (sys.executable, "-c", "raise SystemExit(7)"))
    candidates = [
        small("blade", 0.02),
        small("one", 0.2),
        small("fewer", 0, 1),
        broken,
        Contender("none", missing="away"),
    ]
    monkeypatch.setattr(peers, "contenders", lambda *_: candidates)
    monkeypatch.setattr(peers, "read_bandwidth", lambda: 20.0)
    words = [str(tmp_path), "--precisions", "bf16", "--workloads", "W1,W3", "--rounds", "2"]

    result = asyncio.run(peers.compare(tmp_path, "bf16", peers.parse(words)))
    assert (set(result["servers"]), set(result["missing"])) == ({"blade", "one", "fewer"}, {"broken", "none"})
    assert "exit status 7" in result["missing"]["broken"]
    for facts in result["servers"].values():
        assert 0 < facts["peak_rss_gb"] < 1
        assert 0 < facts["start_seconds"] < 60
    rate, wait = (made.summary() for made in result["cells"])
    for summary in (rate, wait):
        assert summary["values"]["fewer"] == [None, None]
        assert summary["best_peer"] == "one"
        assert 2 < summary["ratio"] < 20
    assert 0.2 <= wait["medians"]["one"] < 1
    assert json.loads(json.dumps(rate)) == rate


def test_rounds_take_turns_and_change_who_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, int]] = []

    async def note(server: str, workload: Workload, tokenizer: Path, number: int) -> dict[str, Any]:
        seen.append((server, number))
        return {}

    async def all_rounds() -> None:
        made = [Cell("m", "bf16", "W1", TOKENS_PER_SECOND)]
        servers: dict[str, Any] = {"a": "A", "b": "B"}
        async for _ in peers.rounds(made, servers, Path(), 3):
            pass

    monkeypatch.setattr(peers, "measure", note)
    asyncio.run(all_rounds())
    assert "".join(server for server, _ in seen) == "ABBAAB"
    assert [number for _, number in seen] == [seed("W1", turn) for turn in (0, 0, 1, 1, 2, 2)]


def test_no_two_workloads_or_rounds_share_a_seed() -> None:
    seeds = [seed(workload, turn) for workload in WORKLOADS for turn in range(5)]
    assert len(set(seeds)) == len(seeds)
    assert 0 not in seeds  # the warm-up's


def test_sigterm_stops_the_servers_too(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hf").symlink_to(tiny_llama)
    groups = []

    async def terminated(server: Server, *_: Any) -> dict[str, Any]:
        groups.append(server.group)
        server.freeze()
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(30)
        return {}

    monkeypatch.setattr(peers, "contenders", lambda *_: [small("blade", 0)])
    monkeypatch.setattr(peers, "read_bandwidth", lambda: None)
    monkeypatch.setattr(peers, "measure", terminated)
    monkeypatch.setattr(os, "sched_setaffinity", lambda *_: None)
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(peers.run(peers.parse([str(tmp_path)])))
    with pytest.raises(ProcessLookupError):
        os.killpg(groups[0], 0)


def test_unknown_names_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        peers.parse(["folder", "--workloads", "W1,W9"])
    assert "['W9'] are not among" in capsys.readouterr().err


def test_nobody_here_is_an_empty_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "contenders", lambda *_: [Contender("blade", missing="away")])
    monkeypatch.setattr(peers, "read_bandwidth", lambda: None)
    options = peers.parse([str(tmp_path), "--workloads", "W1"])
    result = asyncio.run(peers.compare(tmp_path, "bf16", options))
    assert (result["servers"], result["missing"], result["cells"][0].ratio()) == ({}, {"blade": "away"}, None)
