"""Whether drafts leave the text alone: ``python benchmarks/identity.py --plugin qwen``.

Every way of drafting continues the same prompts, alone and many at a time, with drafts that are verified as far as they
pay and with all of them verified; each text is compared with the one without drafts. Ends in one JSON line, and in 1
where a text differs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

from speculation import NONE, Contender, Result, parser_of
from speculation_tasks import tasks
from turnstile import Turnstile

from blade import Config, DraftOptions, EngineConfig, ModelOptions
from blade.assembly import Assembly, choose, load_draft, load_model, load_text
from blade.plugins import load

WINDOW, OFFSETS = 600, (0, 400, 800, 1200, 1600)  # characters
VERIFY = {"adaptive": [False], "all": [True], "both": [False, True]}


def texts(num: int) -> list[str]:
    """Parts of the tasks of all kinds in turn: of code, of prose, and whole questions."""
    parts = [
        text[offset : offset + WINDOW]
        for offset in OFFSETS
        for alike in zip(*tasks().values(), strict=True)
        for text in alike
    ]
    return [part for part in parts if part][:num]


def prepare(options: argparse.Namespace) -> tuple[Assembly, Any, Any, dict[int, list[int]]]:
    """What to run, both models, and the prompts by their numbers."""
    config = Config(
        plugins=(options.plugin,) if options.plugin else (),
        model=ModelOptions(
            model=options.model, quantize=options.quantize, dtype=options.dtype, max_model_len=options.max_model_len
        ),
        draft=DraftOptions(model=options.draft),
        engine=EngineConfig(kv_cache_memory=options.kv_cache_memory, threads=options.threads),
    )
    assembly = choose(config, load(config.plugins))
    model = load_model(assembly)
    tokenizer, _ = load_text(assembly)
    prompts = {i: tokenizer.encode(text) for i, text in enumerate(texts(options.num_prompts))}
    return assembly, model, load_draft(assembly, model), prompts


async def run(contender: Contender, prompts: dict[int, list[int]], options: argparse.Namespace) -> Result:
    result = Result()
    contender.engine.start(asyncio.get_running_loop())
    await contender.run(prompts, options, result)
    contender.engine.stop()
    await asyncio.to_thread(contender.engine.join, 10)
    contender.engine.blocks.check()
    return result


def compare(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """way -> what came of it. All are compared with the first text there is, that without drafts, one at a time."""
    assembly, model, draft, prompts = prepare(options)
    expected: dict[int, list[int]] = {}
    rows: dict[str, dict[str, Any]] = {}
    for num in options.at_a_time:
        options.concurrency = num
        for name in [NONE, *options.drafters.split(",")]:
            for fixed in (False,) if name == NONE else VERIFY[options.verify]:
                way = f"{name}, {num} at a time{', all verified' if fixed else ''}"
                started = time.monotonic()
                result = asyncio.run(run(Contender(name, assembly, model, draft, fixed, Turnstile()), prompts, options))
                expected = expected or result.texts
                rows[way] = {
                    "equal": sum(result.texts[i] == ids for i, ids in expected.items()),
                    "prompts": len(expected),
                    "tokens": sum(result.num_tokens),
                    "verified": result.verified,
                    "accepted": result.accepted,
                    "seconds": round(time.monotonic() - started),
                }
                print(f"{way:40}", rows[way], file=sys.stderr, flush=True)
    return rows


def main() -> None:
    parser = parser_of(__doc__.splitlines()[0])
    parser.add_argument("--num-prompts", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=128, help="of a text; no token ends it")
    parser.add_argument("--at-a-time", type=int, nargs="+", default=[1, 16], help="requests")
    parser.add_argument(
        "--verify", choices=VERIFY, default="both", help="drafts as far as they pay, all of them, or both"
    )
    parser.add_argument("--max-model-len", type=int, default=2048)
    options = parser.parse_args()
    options.stop_token_ids, options.lengths = (), (1.0,)
    rows = compare(options)
    shown = {
        k: v
        for k, v in vars(options).items()
        if k not in ("plugin", "model", "stop_token_ids", "lengths", "concurrency")
    }
    name = options.model and Path(options.model).name
    print(json.dumps({"model": name or options.plugin, **shown, "results": rows}))
    sys.exit(any(row["equal"] < row["prompts"] for row in rows.values()))


if __name__ == "__main__":
    main()
