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
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from load_server import Server, running
from peers_contenders import PRECISIONS, Contender, Programs, contenders
from peers_measure import WARMUP, WORKLOADS, figure, measure, peak_rss_gb, read_bandwidth, seed
from peers_report import Cell, draw, table


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
            await measure(server, WARMUP, tokenizer, 0)
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
                yield cell, name, await measure(servers[name], workload, tokenizer, seed(cell.workload, turn))


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
