"""Dual chunk attention from a folder through the engine: the same tokens whatever happens on the way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from test_dual_chunks import forward, make_model, make_reference
from test_hybrid_engine import NUM_TOKENS, generate, written

from blade import Config, EngineConfig, ModelOptions
from blade.assembly import Assembly, choose, load_model
from blade.plugins import load

if TYPE_CHECKING:
    from blade.contracts import Model

WAYS: dict[str, dict[str, Any]] = {
    "together": {},
    "alone": {"max_num_seqs": 1},
    "small steps": {"max_batch_tokens": 24, "max_num_seqs": 6},
    "little memory": {"kv_cache_memory": 345_000},
    "no prefix cache": {"prefix_cache": False},
    "drafts, all verified": {"drafter": ("suffix",), "adaptive_drafts": False},
    "trees, all verified": {"drafter": ("lookahead",), "adaptive_drafts": False},
}


@pytest.fixture(scope="module")
def expected() -> list[tuple[list[int], list[int]]]:
    """Prompts, and what the definition says to them: their tokens and the answers cross borders of chunks, at 48."""
    model, chunks = make_model("sharpened")
    long = make_reference("sharpened", (200,)).prompts[0]
    said = []
    for prompt in (long, long, long[:150], long[:90], [5] * 140, [7]):
        ids = list(prompt)
        for _ in range(NUM_TOKENS):
            ids.append(int(forward(model, ids, chunks)[-1].argmax()))
        said.append((prompt, ids[len(prompt) :]))
    return said


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Assembly, Model]:
    reference = make_reference("sharpened", (1,))
    folder = written(reference.config, reference.weights.tensors, tmp_path_factory.mktemp("tiny-dual-chunks"))
    options = ModelOptions(model=str(folder), dtype="float32", max_model_len=320)
    assembly = choose(Config(model=options, engine=EngineConfig(threads=1)), load())
    return assembly, load_model(assembly)


@pytest.mark.parametrize("way", WAYS)
def test_tokens_do_not_depend_on_the_way(
    loaded: tuple[Assembly, Model], expected: list[tuple[list[int], list[int]]], way: str
) -> None:
    said, stats = generate(loaded, [prompt for prompt, _ in expected], 2, **WAYS[way])
    assert said == [[ids for _, ids in expected]] * 2
    assert (stats.prompt_tokens_cached > 0) == (way != "no prefix cache")
    assert (stats.preemptions > 0) == (way == "little memory")
    assert stats.draft_tokens > 0 or not way.endswith("all verified")
