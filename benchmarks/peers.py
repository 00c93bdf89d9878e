"""Blade and its peers side by side on one machine, ending in one JSON line; see README.md.

python benchmarks/peers.py MODEL_FOLDER... --precisions bf16,int8 --workloads W1,W3 --rounds 5 --plot bars.png
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import load
from load_server import Server, running
from peers_contenders import PRECISIONS, Contender, Programs, contenders
from peers_report import Cell, draw, table


@dataclass(frozen=True)
class Workload:
    """Arguments of load.py; `metric` is the figure that is compared."""

    title: str
    metric: str
    concurrency: int
    num_requests: int
    input_tokens: int
    output_tokens: int
    shared_prefix: int = 0


TOKENS_PER_SECOND, FIRST_TOKEN = "output tokens/s", "seconds to first token"
WORKLOADS = {
    "W1": Workload("1 stream, 128 in / 128 out", TOKENS_PER_SECOND, 1, 1, 128, 128),
    "W2": Workload("16 streams, 32 requests, 128 in / 128 out", TOKENS_PER_SECOND, 16, 32, 128, 128),
    # Some more tokens than the first: one without text would not be seen as one.
    "W3": Workload("1 prompt of 1024", FIRST_TOKEN, 1, 1, 1024, 4),
    "W4": Workload("8 streams, shared prefix of 768, 896 in / 128 out", TOKENS_PER_SECOND, 8, 8, 896, 128, 768),
}
WARMUP = Workload("", TOKENS_PER_SECOND, 1, 1, 64, 8)


async def measure(server: Server, workload: Workload, tokenizer: Path, seed: int) -> dict[str, Any]:
    """load.py's summary of one run with prompts that the server has not seen, unless `seed` was used before."""
    shape = {
        name.replace("_", "-"): str(getattr(workload, name))
        for name in ("concurrency", "num_requests", "input_tokens", "output_tokens", "shared_prefix")
    }
    words = [f"--{name}={value}" for name, value in shape.items()]
    options = load.parse([f"--url={server.url}", f"--tokenizer={tokenizer}", f"--seed={seed}", "--warmup=0", *words])
    server.thaw()
    try:
        (summary,) = [summary async for summary in load.measure(options, server.url)]
    finally:
        server.freeze()
    return summary


def figure(workload: Workload, summary: dict[str, Any]) -> float | None:
    """None when a request failed: a server that answers less must not look faster."""
    if summary["errors"]:
        return None
    if workload.metric == FIRST_TOKEN:
        return round(float(summary["ttft_ms"]["p50"]) / 1000, 3)
    return float(summary["output_tokens_per_second"])


@contextlib.asynccontextmanager
async def started(
    candidates: list[Contender], tokenizer: Path, missing: dict[str, str]
) -> AsyncIterator[dict[str, Server]]:
    """All that can start, one after the other, warm and frozen. Adds why to `missing` for the rest."""
    async with contextlib.AsyncExitStack() as stack:
        servers = {}
        for contender in candidates:
            if contender.missing:
                missing[contender.name] = contender.missing
                continue
            log = Path(tempfile.gettempdir()) / f"peers-{contender.name}.log"
            try:
                server = await stack.enter_async_context(running(contender.command, contender.env, log))
            except (OSError, SystemExit, TimeoutError) as error:
                missing[contender.name] = f"{str(error) or 'It did not start in time.'} See {log}"
                continue
            await measure(server, WARMUP, tokenizer, seed=0)
            servers[contender.name] = server
        yield servers


async def rounds(
    cells: list[Cell], servers: dict[str, Server], tokenizer: Path, num_rounds: int
) -> AsyncIterator[tuple[Cell, str, dict[str, Any]]]:
    """Each contender once on a workload, `num_rounds` times; who begins changes."""
    for cell in cells:
        workload = WORKLOADS[cell.workload]
        for turn in range(num_rounds):
            first = turn % max(1, len(servers))
            for name in [*list(servers)[first:], *list(servers)[:first]]:
                yield cell, name, await measure(servers[name], workload, tokenizer, seed=turn + 1)


def peak_rss_gb(group: int) -> float:
    """Sum over the processes of a group; pages of a mapped file count."""
    peaks = []
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError, IndexError):
            if os.getpgid(int(status.parent.name)) == group:
                peaks.append(int(status.read_text().split("VmHWM:")[1].split()[0]))
    return round(sum(peaks) / 1e6, 2)


def read_bandwidth() -> float | None:
    """GB/s that blade's own kernel reads memory with; None without compiled kernels."""
    script = str(Path(__file__).with_name("kernels.py"))
    done = subprocess.run([sys.executable, script, "--ops"], stdout=subprocess.PIPE, text=True, check=False)
    return json.loads(done.stdout.splitlines()[-1])["read_gb_s"] if done.returncode == 0 else None


async def compare(model: Path, precision: str, options: argparse.Namespace) -> dict[str, Any]:
    """One model in one precision: its servers, its cells, and the bandwidth before and after."""
    missing: dict[str, str] = {}
    cells = [Cell(model.name, precision, workload, WORKLOADS[workload].metric) for workload in options.workloads]
    candidates = contenders(model, PRECISIONS[precision], options.programs, options.cpus)
    bandwidth = [read_bandwidth()]
    async with started(candidates, model / "hf", missing) as servers:
        for name, why in missing.items():
            print(f"{model.name} {precision} {name}: missing, {why}", file=sys.stderr, flush=True)
        async for cell, name, summary in rounds(cells, servers, model / "hf", options.rounds):
            cell.add(name, figure(WORKLOADS[cell.workload], summary), summary)
            print(
                f"{model.name} {precision} {cell.workload} {name}: {cell.values[name][-1]}", file=sys.stderr, flush=True
            )
        facts = {
            name: {"start_seconds": round(server.start_seconds, 2), "peak_rss_gb": peak_rss_gb(server.group)}
            for name, server in servers.items()
        }
    bandwidth.append(read_bandwidth())
    shared = {"model": model.name, "precision": precision}
    return shared | {"read_gb_s": bandwidth, "servers": facts, "missing": missing, "cells": cells}


async def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    if task := asyncio.current_task():  # so that the servers are stopped, too
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    os.sched_setaffinity(0, options.cpus)  # ours and, inherited, the servers'
    return [await compare(model, name, options) for model in options.models for name in options.precisions]


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Programs()
    parser.add_argument("models", nargs="+", type=Path, help="folders as README.md describes them")
    parser.add_argument("--precisions", default=",".join(PRECISIONS), type=_choice(PRECISIONS))
    parser.add_argument("--workloads", default=",".join(WORKLOADS), type=_choice(WORKLOADS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cpus", default="0,1", type=lambda text: [int(number) for number in text.split(",")])
    parser.add_argument("--blade-options", default="", help="more arguments of `blade serve`")
    parser.add_argument("--llama-server", default=default.llama_server, help="path; default: LLAMA_SERVER or on PATH")
    parser.add_argument("--openvino-python", default=default.openvino_python, help="path; default: OPENVINO_PYTHON")
    parser.add_argument("--vllm", default=default.vllm, help="path; default: VLLM or on PATH")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw bars; needs matplotlib")
    options = parser.parse_args(argv)
    names = ("blade_options", "llama_server", "openvino_python", "vllm")
    options.programs = Programs(**{name: getattr(options, name) for name in names})
    return options


def _choice(known: dict[str, Any]) -> Any:
    def names(text: str) -> list[str]:
        if unknown := set(text.split(",")) - set(known):
            raise argparse.ArgumentTypeError(f"{sorted(unknown)} are not among {list(known)}")
        return text.split(",")

    return names


def main(argv: list[str]) -> None:
    options = parse(argv)
    results = asyncio.run(run(options))
    cells = [cell for result in results for cell in result["cells"]]
    print(table(cells), file=sys.stderr)
    if options.plot:
        draw(cells, options.plot)
    report = {"benchmark": "peers", "cpus": options.cpus, "rounds": options.rounds}
    results = [result | {"cells": [cell.summary() for cell in result["cells"]]} for result in results]
    print(json.dumps(report | {"results": results}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
