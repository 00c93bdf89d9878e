"""What speculative decoding brings: ``python benchmarks/speculation.py --plugin qwen``.

Every way of drafting runs the same tasks (speculation_tasks.py) in one process, over the same weights, in turns of a
fraction of a second (turnstile.py). Measured is the time from submitting to the last token, prompts included, and
whether the text is the same as without drafts. Ends in one JSON line; speculation_plot.py draws those of several runs.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import itertools
import json
import statistics
import sys
from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import Any

from drafts_ledger import Ledger
from speculation_tasks import tasks
from turnstile import Clock, Turnstile

from blade import Config, DraftOptions, EngineConfig, ModelOptions, SamplingParams, Sequence
from blade.assembly import Assembly, build_engine, choose, load_draft, load_model, load_text
from blade.engine.engine import Engine
from blade.plugins import load

NONE = "none"
DRAFT_MODELS = {"model", "eagle3", "mtp"}  # the drafters that need one
CONTROL = "control"  # without drafts as well: how far apart two measurements of the same are
# Of replies where many run at a time, by --max-tokens: if they were alike, all would begin and end together without
# drafts, and none would wait for another's prompt, as many do in life.
LENGTHS = (1.0, 0.6, 1.3, 0.8, 1.1)
counter = itertools.count(1)


@dataclass
class Result:
    """All that one way of drafting did for the tasks of one kind."""

    seconds: list[float] = field(default_factory=list)  # of each turn, from submitting to the last token
    decoding: list[float] = field(default_factory=list)  # of it, after first tokens: summed over its requests
    num_tokens: list[int] = field(default_factory=list)
    verified: int = 0
    accepted: int = 0
    drafts: int = 0
    by_ledger: list[float] = field(default_factory=list)  # of each turn
    texts: dict[Any, list[int]] = field(default_factory=dict)  # by number of the task and place in the line


class Contender:
    """An engine that drafts in one way."""

    def __init__(
        self, name: str, assembly: Assembly, model: Any, draft: Any, fixed: bool, turnstile: Turnstile
    ) -> None:
        names = () if name in (NONE, CONTROL) else tuple(name.split("+"))
        engine = replace(assembly.config.engine, drafter=names, adaptive_drafts=not fixed)
        assembly = replace(assembly, config=replace(assembly.config, engine=engine))
        if not DRAFT_MODELS.intersection(names):
            assembly, draft = replace(assembly, draft=None), None
        self.name = name
        self.engine: Engine = build_engine(assembly, model, assembly.plan_memory(), draft)
        self.clock = Clock(self.engine, turnstile)
        self.ledger = Ledger(self.engine)

    async def warm_up(self, prompt: list[int], most: int) -> None:
        """Steps of `most` sequences and of all fewer ones: each size is slow at first."""
        seqs = [
            Sequence(next(counter), prompt, SamplingParams(max_tokens=8 + 4 * i, temperature=0)) for i in range(most)
        ]
        async for _ in self.engine.submit(seqs):
            pass

    async def run(self, prompts: dict[int, list[int]], options: argparse.Namespace, result: Result) -> None:
        """All prompts, so many at a time."""
        before, num_tokens, decoding = self.engine.stats(), 0, 0.0
        # Enough requests that the batch is full for most of the time.
        left = list(prompts.items()) * (1 if options.concurrency == 1 else -(-3 * options.concurrency // len(prompts)))

        async def client() -> None:
            nonlocal num_tokens, decoding
            while left:
                (number, prompt), place = left.pop(0), len(left)
                # A namespace of its own: nothing is known from earlier rounds, neither prefix nor reply.
                seq_id = next(counter)
                share = options.lengths[place % len(options.lengths)]
                params = SamplingParams(
                    max_tokens=int(share * options.max_tokens),
                    temperature=options.temperature,
                    seed=number,
                    stop_token_ids=options.stop_token_ids,
                )
                seq = Sequence(seq_id, prompt, params, namespace=b"%d" % seq_id)
                first = None
                async for _ in self.engine.submit([seq]):
                    first = first or self.clock()
                decoding += self.clock() - (first or 0)
                num_tokens += len(seq.output_ids)
                result.texts[number, place] = seq.output_ids

        self.ledger.start_anew()
        started = self.clock()
        with self.clock:
            await asyncio.gather(*(client() for _ in range(options.concurrency)))
        result.seconds.append(self.clock() - started)
        result.decoding.append(decoding)
        result.num_tokens.append(num_tokens)
        await asyncio.sleep(0.01)
        result.by_ledger.append(self.ledger.speedup())
        after = self.engine.stats()
        result.verified += after.draft_tokens - before.draft_tokens
        result.accepted += after.draft_tokens_accepted - before.draft_tokens_accepted
        result.drafts += sum(d.drafts_verified for d in after.drafters) - sum(
            d.drafts_verified for d in before.drafters
        )


def prepare(options: argparse.Namespace) -> tuple[list[Contender], dict[str, list[list[int]]], str]:
    names = [NONE, *options.drafters.split(",")]
    config = Config(
        plugins=(options.plugin,) if options.plugin else (),
        model=ModelOptions(
            model=options.model, quantize=options.quantize, dtype=options.dtype, max_model_len=options.max_model_len
        ),
        draft=DraftOptions(model=options.draft),
        engine=EngineConfig(
            num_draft_tokens=options.num_draft_tokens, kv_cache_memory=options.kv_cache_memory, threads=options.threads
        ),
    )
    assembly = choose(config, load(config.plugins))
    model = load_model(assembly)
    draft = load_draft(assembly, model)
    tokenizer, template = load_text(assembly)
    if template is None:
        sys.exit("The model has no chat template.")
    options.stop_token_ids = tokenizer.eos_token_ids
    prompts = {
        kind: [
            template.render_ids(tokenizer, [{"role": "user", "content": text}]) for text in texts[: options.num_tasks]
        ]
        for kind, texts in tasks().items()
        if kind in options.kinds.split(",")
    }
    turnstile = Turnstile()
    contenders = [Contender(name, assembly, model, draft, options.fixed, turnstile) for name in names]
    return contenders, prompts, assembly.model_name


async def measure(
    contenders: list[Contender], prompts: dict[str, list[list[int]]], options: argparse.Namespace
) -> dict[str, dict[str, Result]]:
    loop = asyncio.get_running_loop()
    results: dict[str, dict[str, Result]] = {kind: defaultdict(Result) for kind in prompts}
    for contender in contenders:
        contender.engine.start(loop)
        await contender.warm_up(next(iter(prompts.values()))[0][:32], options.concurrency)
    gc.collect()
    gc.freeze()  # as blade serve does
    for _ in range(options.rounds):
        for kind, all_ids in prompts.items():
            size = len(all_ids) if options.concurrency > 1 else 1
            for first in range(0, len(all_ids), size):  # short turns: a machine that slows down slows all
                part = {i: all_ids[i] for i in range(first, min(first + size, len(all_ids)))}
                runs = (contender.run(part, options, results[kind][contender.name]) for contender in contenders)
                await asyncio.gather(*runs)
    for contender in contenders:
        contender.engine.stop()
        await asyncio.to_thread(contender.engine.join, 10)
    return results


def report(results: dict[str, dict[str, Result]]) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for kind, by_name in results.items():
        plain = by_name[NONE]
        for name, result in by_name.items():
            pairs = zip(plain.decoding, result.decoding, strict=True)
            rows.setdefault(kind, {})[name] = {
                "tokens_per_second": round(sum(result.num_tokens) / sum(result.decoding), 2),
                "speedup": round(sum(plain.decoding) / sum(result.decoding), 3),
                "speedup_of_the_median_task": round(statistics.median(a / b for a, b in pairs if b), 3),
                "speedup_of_whole_requests": round(sum(plain.seconds) / sum(result.seconds), 3),
                "speedup_by_ledger": round(statistics.mean(result.by_ledger), 3),
                "same_text": sum(result.texts[i] == ids for i, ids in plain.texts.items()),
                "num_tasks": len(plain.texts),
                "acceptance": round(result.accepted / result.verified, 3) if result.verified else None,
                "mean_accepted": round(result.accepted / result.drafts, 2) if result.drafts else None,
            }
            print(f"{kind:8} {name:14}", rows[kind][name], file=sys.stderr, flush=True)
    return rows


def parser_of(description: str) -> argparse.ArgumentParser:
    """With the options that say what runs, whatever is measured of it."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--plugin", help="whose demo model to run")
    parser.add_argument("--model", help="or: a folder or a .gguf file")
    parser.add_argument("--quantize", help="as blade serve --quantize")
    parser.add_argument("--dtype", default="auto", help="as blade serve --dtype")
    parser.add_argument("--draft", help="as blade serve --draft.model; ask for it with --drafters model or eagle3")
    parser.add_argument("--drafters", default="suffix,ngram", help=f"ways to compare; a+b is a chain, {CONTROL} none")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--kv-cache-memory", type=int, default=1 << 30, help="bytes, of each way")
    return parser


def main() -> None:
    parser = parser_of(__doc__.splitlines()[0])
    parser.add_argument("--kinds", default="edit,summary,chat", help="of tasks")
    parser.add_argument("--num-tasks", type=int, default=8, help="of each kind, at most")
    parser.add_argument("--num-draft-tokens", type=int, default=EngineConfig().num_draft_tokens)
    parser.add_argument("--fixed", action="store_true", help="verify all draft tokens, whether they pay or not")
    parser.add_argument("--concurrency", type=int, default=1, help="requests at a time")
    parser.add_argument("--max-tokens", type=int, default=256, help="of a reply")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--max-model-len", type=int, default=4096)
    options = parser.parse_args()
    options.lengths = LENGTHS if options.concurrency > 1 else (1.0,)
    contenders, prompts, model_name = prepare(options)
    rows = report(asyncio.run(measure(contenders, prompts, options)))
    shown = {k: v for k, v in vars(options).items() if k not in ("stop_token_ids", "model", "lengths")}
    print(json.dumps({"model": model_name, **shown, "results": rows}))


if __name__ == "__main__":
    main()
