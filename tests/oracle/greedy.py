"""Greedy decoding of the oracle's prompts through the whole engine, without HTTP.

    python tests/oracle/greedy.py MODEL.gguf tests/oracle/NAME.json     # the full matrix, minutes

prints one line per way of running: how many of the prompts got exactly transformers' ids.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from blade import Config, EngineConfig, ModelOptions, SamplingParams, Sequence
from blade.assembly import Assembly, build_engine, choose, load_model
from blade.contracts import Model
from blade.plugins import load

counter = itertools.count()
WAYS: dict[str, dict[str, Any]] = {
    "batch of 16": {},
    "alone": {"max_num_seqs": 1},
    "chunks of 16": {"max_batch_tokens": 16, "max_num_seqs": 16},
    "no prefix cache": {"prefix_cache": False},
    "forced preemption": {"kv_cache_memory": "tight"},
    "suffix drafts": {"drafter": ("suffix",)},
    "n-gram drafts, all verified": {"drafter": ("ngram",), "adaptive_drafts": False},
    "both, alone": {"drafter": ("suffix", "ngram"), "max_num_seqs": 1},
}


def prepare(model: Path, dtype: str = "float32", quantize: str | None = "none") -> tuple[Assembly, Model]:
    """transformers dequantises a GGUF file's weights, and so do we, unless `quantize` says otherwise."""
    options = ModelOptions(model=str(model), dtype=dtype, quantize=quantize, max_model_len=2048)  # type: ignore[arg-type]
    assembly = choose(Config(model=options), load())
    return assembly, load_model(assembly)


def decode(
    assembly: Assembly, model: Model, cases: list[dict[str, list[int]]], num_tokens: int = 64, **engine: Any
) -> tuple[list[list[int]], Any]:
    """The greedy ids of every prompt, submitted together, and the engine's statistics."""
    tight = engine.pop("kv_cache_memory", None) == "tight"
    config = replace(assembly.config, engine=EngineConfig(**engine))
    assembly = replace(assembly, config=config)
    memory = assembly.plan_memory()
    if tight:  # a third of what all of them need together, but enough for the longest
        lengths = [len(case["prompt"]) + num_tokens for case in cases]
        memory = replace(memory, num_blocks=max(sum(lengths) // 3, max(lengths) + 16) // memory.block_size + 1)
    engine_thread = build_engine(assembly, model, memory)
    seqs = [
        Sequence(next(counter), case["prompt"], SamplingParams(max_tokens=num_tokens, temperature=0.0))
        for case in cases
    ]

    async def main() -> None:
        engine_thread.start(asyncio.get_running_loop())
        async for _ in engine_thread.submit(seqs):
            pass
        engine_thread.stop()
        await asyncio.to_thread(engine_thread.join, 10)

    asyncio.run(main())
    engine_thread.blocks.check()
    return [seq.output_ids for seq in seqs], engine_thread.stats()


def main() -> None:
    cases = json.loads(Path(sys.argv[2]).read_text())
    assembly, model = prepare(Path(sys.argv[1]))
    for name, engine in WAYS.items():
        started = time.monotonic()
        found, stats = decode(assembly, model, cases, **engine)
        equal = sum(ids == case["output"] for ids, case in zip(found, cases, strict=True))
        seconds = time.monotonic() - started
        print(f"{name}: {equal} of {len(cases)} equal, {stats.preemptions} preemptions, {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
