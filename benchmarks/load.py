"""Load a server over HTTP and end in one JSON line; see README.md.

python benchmarks/load.py --serve "--plugin qwen" --concurrency 1,4,16
python benchmarks/load.py --url http://127.0.0.1:8081 --rate 2 --num-requests 100
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
from load_client import Result, request
from load_prompts import Prompts, tokenize_topics
from load_server import serving

Send = Callable[[], Any]  # one request with a new prompt: an awaitable Result


async def closed_loop(send: Send, num_requests: int, concurrency: int) -> list[Result]:
    """`concurrency` clients, each sending its next request when the last one is answered."""
    left = iter(range(num_requests))

    async def client() -> list[Result]:
        return [await send() for _ in left]

    return [result for results in await asyncio.gather(*(client() for _ in range(concurrency))) for result in results]


async def open_loop(send: Send, num_requests: int, rate: float, seed: int) -> list[Result]:
    """Requests come when they come: a Poisson process of `rate` per second."""
    arrivals = random.Random(seed)
    tasks = []
    for _ in range(num_requests):
        tasks.append(asyncio.create_task(send()))
        await asyncio.sleep(arrivals.expovariate(rate))
    return await asyncio.gather(*tasks)


def summarize(results: list[Result], seconds: float) -> dict[str, Any]:
    good = [result for result in results if not result.error]
    num_output = sum(result.output_tokens for result in good)
    return {
        "requests": len(results),
        "errors": len(results) - len(good),
        "seconds": round(seconds, 3),
        "prompt_tokens": sum(result.prompt_tokens for result in good),
        "cached_tokens": sum(result.cached_tokens for result in good),
        "output_tokens": num_output,
        "output_tokens_per_second": round(num_output / seconds, 2),
        "ttft_ms": percentiles([result.first_token for result in good]),
        "itl_ms": percentiles([gap for result in good for gap in result.gaps]),
    }


def percentiles(seconds: list[float]) -> dict[str, float | None]:
    """p50 and p99 in milliseconds, interpolated; null without a value."""
    if len(seconds) < 2:
        only = round(seconds[0] * 1000, 2) if seconds else None
        return {"p50": only, "p99": only}
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return {"p50": round(cuts[49] * 1000, 2), "p99": round(cuts[98] * 1000, 2)}


async def measure(options: argparse.Namespace, url: str) -> AsyncIterator[dict[str, Any]]:
    """One summary per concurrency, or one for the rate."""
    text = tokenize_topics(options.tokenizer) if options.tokenizer else None
    prompts = Prompts(text, options.input_tokens, options.shared_prefix, options.seed)
    headers = {"Authorization": f"Bearer {options.api_key}"} if options.api_key else {}
    timeout = aiohttp.ClientTimeout(total=options.timeout)
    # A connection for each request: some servers close idle ones just as the next request is on its way.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, headers=headers) as session:
        body = {
            "model": options.model or await model_name(session, url),
            "max_tokens": options.output_tokens,
            "min_tokens": options.output_tokens,
            "ignore_eos": True,
            "temperature": options.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }

        async def send() -> Result:
            return await request(session, url, body | {"prompt": prompts.next()})

        for _ in range(options.warmup):
            await send()
        for concurrency in [None] if options.rate else options.concurrency:
            num_requests = options.num_requests or 4 * (concurrency or 25)
            started = time.perf_counter()
            if concurrency is None:
                results = await open_loop(send, num_requests, options.rate, options.seed)
            else:
                results = await closed_loop(send, num_requests, concurrency)
            for error in sorted({result.error for result in results if result.error})[:3]:
                print(f"error: {error}", file=sys.stderr)
            load = {"rate": options.rate} if concurrency is None else {"concurrency": concurrency}
            yield load | summarize(results, time.perf_counter() - started)


async def model_name(session: aiohttp.ClientSession, url: str) -> str:
    async with session.get(f"{url}/v1/models") as response:
        if response.status != 200:
            raise SystemExit(f"/v1/models answers with status {response.status}: use --model and --api-key.")
        return (await response.json())["data"][0]["id"]


async def run(options: argparse.Namespace) -> dict[str, Any]:
    shape = ("input_tokens", "output_tokens", "shared_prefix", "temperature", "seed")
    report: dict[str, Any] = {"benchmark": "load"} | {name: getattr(options, name) for name in shape}
    if options.serve is None:
        return report | {"runs": [summary async for summary in shown(measure(options, options.url))]}
    async with serving(options.serve) as (url, seconds):
        report |= {"serve": options.serve, "cold_start_seconds": round(seconds, 2)}
        return report | {"runs": [summary async for summary in shown(measure(options, url))]}


async def shown(summaries: AsyncIterator[dict[str, Any]]) -> AsyncIterator[dict[str, Any]]:
    async for summary in summaries:
        print(" ".join(f"{name}={value}" for name, value in summary.items()), file=sys.stderr, flush=True)
        yield summary


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--url", help="of a running server")
    where.add_argument(
        "--serve", metavar="ARGS", help="start `blade serve ARGS` on a free port, and stop it at the end"
    )
    parser.add_argument("--model", help="name in the requests; by default the first that the server lists")
    parser.add_argument("--api-key", default=os.environ.get("BLADE_API_KEY", ""))
    parser.add_argument(
        "--concurrency", default="1,4,16", type=lambda text: [int(number) for number in text.split(",")]
    )
    parser.add_argument("--rate", type=float, help="requests per second, arriving at random, instead of --concurrency")
    parser.add_argument("--num-requests", type=int, help="per run; by default 4 per client, with --rate 100")
    parser.add_argument("--input-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument(
        "--shared-prefix", type=int, default=0, help="so many of the input tokens are alike in all prompts"
    )
    parser.add_argument("--tokenizer", type=Path, help="folder, tokenizer.json or .gguf: prompts of real text")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--warmup", type=int, default=1, help="requests before the measurement")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for one request")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    if not 0 <= options.shared_prefix < options.input_tokens:
        parser.error("--shared-prefix must be below --input-tokens")
    return options


def main(argv: list[str]) -> int:
    report = asyncio.run(run(parse(argv)))
    print(json.dumps(report), flush=True)
    return 1 if any(summary["errors"] for summary in report["runs"]) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
