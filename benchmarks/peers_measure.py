"""What is measured: the workloads, one run of them, and what a server takes."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import load
from load_server import Server


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


async def measure(server: Server, workload: Workload, tokenizer: Path, number: int) -> dict[str, Any]:
    """load.py's summary of one run. Its prompts are new to the server unless `number`, their seed, was used before."""
    shape = {
        name.replace("_", "-"): str(getattr(workload, name))
        for name in ("concurrency", "num_requests", "input_tokens", "output_tokens", "shared_prefix")
    }
    words = [f"--{name}={value}" for name, value in shape.items()]
    options = load.parse([f"--url={server.url}", f"--tokenizer={tokenizer}", f"--seed={number}", "--warmup=0", *words])
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


def seed(workload: str, turn: int) -> int:
    """Of its own for each workload and round; WARMUP has 0. One seed's prompts of any length begin alike, and a server
    would find one workload's prompt in what it has kept of another's."""
    return 1 + turn * len(WORKLOADS) + list(WORKLOADS).index(workload)


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
