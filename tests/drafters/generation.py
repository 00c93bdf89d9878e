"""Runs an engine over many prompts at once: what the tests of drafters compare."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from blade import EngineConfig, SamplingParams, Sequence
from blade.assembly import build_engine

if TYPE_CHECKING:
    from blade.assembly import Assembly

counter = itertools.count(1)
PROMPTS = [[(i * 7 + j * j) % 200 + 10 for j in range(5 + 9 * i)] * (1 + i % 3) for i in range(8)]
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "plain": {"temperature": 1.0},
    "hot": {"temperature": 1.7, "top_k": 40},
    "nucleus": {"temperature": 0.8, "top_p": 0.9, "min_p": 0.01},
    "penalties": {"temperature": 0.9, "repetition_penalty": 1.2, "presence_penalty": 0.4, "frequency_penalty": 0.3},
    "biased": {"temperature": 0.7, "logit_bias": {20: 4.0, 21: -4.0}, "min_tokens": 20, "stop_token_ids": (30, 31, 32)},
    "logprobs": {"temperature": 0.6, "logprobs": 3},
}
WAYS: dict[str, dict[str, Any]] = {
    "together": {},
    "alone": {"max_num_seqs": 1},
    "small steps": {"max_batch_tokens": 12, "max_num_seqs": 6},
    "little memory": {"kv_cache_memory": 32 * 2 * 4 * 16 * 2 * 2 * 16},
    "no prefix cache": {"prefix_cache": False},
}


def generate(
    assembly: Assembly,
    model: Any,
    draft: Any,
    params: dict[str, Any],
    prompts: list[list[int]] = PROMPTS,
    rounds: int = 1,
    **engine: Any,
) -> Any:
    """(what was sampled for each prompt, round after round; the engine's statistics)."""
    settings = EngineConfig(**{"kv_cache_memory": 4 << 20, "num_draft_tokens": 5, "threads": 1} | engine)
    assembly = replace(assembly, config=replace(assembly.config, engine=settings))
    built = build_engine(assembly, model, assembly.plan_memory(), draft)
    said: list[list[Any]] = []

    async def main() -> None:
        built.start(asyncio.get_running_loop())
        for _ in range(rounds):
            seqs = [
                Sequence(next(counter), prompt, SamplingParams(**{"max_tokens": 40, "seed": 3 * i} | params))
                for i, prompt in enumerate(prompts)
            ]
            found: dict[int, list[Any]] = {seq.id: [] for seq in seqs}
            async for outputs in built.submit(seqs):
                for output in outputs:
                    assert output.error is None
                    assert output.num_accepted <= output.num_drafted
                    found[output.seq_id] += output.sampled
            said.extend(found.values())
        await asyncio.sleep(0)
        built.stop()
        assert await asyncio.to_thread(built.join, 30)

    asyncio.run(main())
    built.blocks.check()
    assert built.blocks.num_used == 0
    return said, built.stats()


def ids(said: list[list[Any]]) -> list[list[int]]:
    return [[token.token_id for token in seq] for seq in said]
