"""Rough treatment over HTTP: many streams of which half are cut, then many mixed requests; what is left behind?

    python benchmarks/soak.py --serve "--plugin llama --max-model-len 2048 --kv-cache-memory 268435456"

Ends in one JSON line: streams that finished, the latency of /health meanwhile, blocks and requests left afterwards, and
the server's memory before and after the mixed requests. The exit status is 1 when something leaked or failed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp
from load_server import serving

MIXED_CONCURRENCY = 32


async def stream(session: aiohttp.ClientSession, url: str, body: dict[str, Any], cut_after: int | None) -> bool:
    """Read a stream to its [DONE], or leave after `cut_after` events; True if it ended as it should."""
    num_events = 0
    async with session.post(f"{url}/v1/completions", json=body | {"stream": True}) as response:
        async for line in response.content:
            if line.startswith(b"data: "):
                num_events += 1
                if line == b"data: [DONE]\n":
                    return cut_after is None
                if num_events == cut_after:
                    return True
    return False


async def watch_health(session: aiohttp.ClientSession, url: str, seconds: list[float]) -> None:
    while True:
        started = time.perf_counter()
        async with session.get(f"{url}/health") as response:
            if response.status != 200:
                raise SystemExit("/health was not true")
        seconds.append(time.perf_counter() - started)
        await asyncio.sleep(0.02)


async def cut_half(session: aiohttp.ClientSession, url: str, num_streams: int) -> dict[str, Any]:
    latencies: list[float] = []
    watcher = asyncio.create_task(watch_health(session, url, latencies))
    bodies = [{"prompt": f"Story number {i}:", "max_tokens": 60, "ignore_eos": True} for i in range(num_streams)]
    tasks = [stream(session, url, body, cut_after=5 if i % 2 else None) for i, body in enumerate(bodies)]
    ended = await asyncio.gather(*tasks)
    watcher.cancel()
    latencies.sort()
    return {
        "streams": num_streams,
        "ended_as_expected": sum(ended),
        "health_ms": {q: round(1e3 * latencies[int(len(latencies) * p)], 2) for q, p in (("p50", 0.5), ("p99", 0.99))},
    }


def mixed_body(rng: random.Random) -> dict[str, Any]:
    body: dict[str, Any] = {
        "prompt": [rng.randrange(100, 40000) for _ in range(rng.choice((3, 20, 60)))],
        "max_tokens": rng.choice((1, 4, 12)),
        "temperature": rng.choice((0.0, 0.8, 1.0)),
    }
    extras: list[dict[str, Any]] = [
        {}, {"top_p": 0.9, "top_k": 40}, {"n": 2}, {"stop": ["the", "\n"]}, {"logprobs": 2},
        {"repetition_penalty": 1.1, "presence_penalty": 0.5}, {"temperature": -1}, {"stream": True}, {"seed": 1},
    ]  # fmt: skip
    return body | rng.choice(extras)


async def mixed(session: aiohttp.ClientSession, url: str, num_requests: int) -> dict[str, int]:
    rng, gate, statuses = random.Random(0), asyncio.Semaphore(MIXED_CONCURRENCY), {}

    async def one(body: dict[str, Any]) -> None:
        async with gate, session.post(f"{url}/v1/completions", json=body) as response:
            await response.read()
            statuses[str(response.status)] = statuses.get(str(response.status), 0) + 1

    await asyncio.gather(*(one(mixed_body(rng)) for _ in range(num_requests)))
    return statuses


async def gauge(session: aiohttp.ClientSession, url: str, pattern: str) -> float:
    async with session.get(f"{url}/metrics") as response:
        found = re.search(rf"^{pattern} (\S+)", await response.text(), re.M)
    if found is None:
        raise SystemExit(f"/metrics has no {pattern}")
    return float(found[1])


def resident_mib(port: str) -> float:
    """Of the server that listens on `port`: the process whose command line names it."""
    for folder in Path("/proc").glob("[0-9]*"):
        words = (folder / "cmdline").read_bytes().split(b"\0") if (folder / "cmdline").exists() else []
        if b"--port" in words and words[words.index(b"--port") + 1] == port.encode():
            status = (folder / "status").read_text()
            return int(status.split("VmRSS:")[1].split()[0]) / 1024
    raise SystemExit("the server's process was not found")


async def run(args: argparse.Namespace) -> dict[str, Any]:
    connector = aiohttp.TCPConnector(limit=0)
    async with serving(args.serve) as (url, _), aiohttp.ClientSession(connector=connector) as session:
        result: dict[str, Any] = {"benchmark": "soak", "serve": args.serve}
        result |= await cut_half(session, url, args.streams)
        statuses = await mixed(session, url, args.requests // 4)  # caches and pools fill up
        before = resident_mib(url.rsplit(":", 1)[1])
        for status, count in (await mixed(session, url, args.requests)).items():
            statuses[status] = statuses.get(status, 0) + count
        result |= {"mixed_statuses": statuses, "rss_mib_before": round(before)}
        result["rss_mib_after"] = round(resident_mib(url.rsplit(":", 1)[1]))
        await asyncio.sleep(0.5)
        result["blocks_used_after"] = await gauge(session, url, args.blocks_used)
        result["running_after"] = await gauge(session, url, args.running)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--serve", required=True, metavar="ARGS", help="arguments of `blade serve`")
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--requests", type=int, default=2000, help="mixed requests")
    parser.add_argument("--blocks-used", default=r"blade_kv_blocks_used", help=argparse.SUPPRESS)
    parser.add_argument("--running", default="blade_engine_sequences_running", help=argparse.SUPPRESS)
    args = parser.parse_args()
    result = asyncio.run(run(args))
    print(json.dumps(result))
    clean = result["ended_as_expected"] == args.streams and not result["blocks_used_after"] + result["running_after"]
    sys.exit(0 if clean and set(result["mixed_statuses"]) <= {"200", "400"} else 1)


if __name__ == "__main__":
    main()
