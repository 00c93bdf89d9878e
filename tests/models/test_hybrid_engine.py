"""A model with recurrent layers from its folder through the engine: the same tokens whatever happens on the way."""

from __future__ import annotations

import asyncio
import itertools
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from checkpoints import Reference, make_reference
from safetensors.torch import save_file
from stepper import Stepper

from blade import Config, ConfigError, DraftOptions, EngineConfig, EngineStats, ModelOptions, SamplingParams, Sequence
from blade.assembly import Assembly, build_engine, choose, load_draft, load_model
from blade.banner import describe
from blade.plugins import load

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from blade.contracts import Model

NUM_TOKENS = 16
counter = itertools.count(1)
WAYS: dict[str, dict[str, Any]] = {
    "together": {},
    "alone": {"max_num_seqs": 1},
    "small steps": {"max_batch_tokens": 12, "max_num_seqs": 6},
    "little memory": {"kv_cache_memory": 400_000},
    "no prefix cache": {"prefix_cache": False},
    "drafts": {"drafter": ("ngram", "suffix"), "num_draft_tokens": 4},
    "drafts, all verified": {"drafter": ("suffix",), "adaptive_drafts": False, "max_batch_tokens": 30},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    reference = make_reference("qwen3.5 vision")
    tensors = reference.weights.tensors | heads(reference.weights.tensors)
    return written(reference.config, tensors, tmp_path_factory.mktemp("tiny-hybrid"))


def written(config: dict[str, Any], tensors: Mapping[str, Tensor], folder: Path) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def heads(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Multi-token prediction whose layer is the model's last one: now and then it is right."""
    layer, norm = "model.language_model.layers.3.", tensors["model.language_model.norm.weight"]
    found = {name.replace(layer, "mtp.layers.0."): x.clone() for name, x in tensors.items() if name.startswith(layer)}
    eye = torch.eye(len(norm))
    names = ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")
    return found | {f"mtp.{name}.weight": norm.clone() for name in names} | {"mtp.fc.weight": torch.cat([eye, eye], 1)}


@pytest.fixture(scope="module")
def loaded(folder: Path) -> tuple[Assembly, Model]:
    return opened(folder)


def opened(folder: Path) -> tuple[Assembly, Model]:
    options = ModelOptions(model=str(folder), dtype="float32", max_model_len=128)
    assembly = choose(Config(model=options, engine=EngineConfig(threads=1)), load())
    return assembly, load_model(assembly)


@pytest.fixture(scope="module")
def expected() -> list[tuple[list[int], list[int]]]:
    return greedy(make_reference("qwen3.5 vision"))


def greedy(reference: Reference) -> list[tuple[list[int], list[int]]]:
    """Prompts, and what the model says to them, each token from a pass of its own over all before it."""
    prompts = [reference.prompts[4][:90], reference.prompts[4][:90], reference.prompts[4][:70], [5] * 40, [7]]
    said = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(NUM_TOKENS):
            logits = Stepper(replace(reference, prompts=[ids])).step({0: (0, len(ids))}, rows=[len(ids) - 1])
            ids.append(int(logits[0].argmax()))
        said.append((prompt, ids[len(prompt) :]))
    return said


def generate(
    loaded: tuple[Assembly, Model], prompts: list[list[int]], rounds: int, draft: Any = None, **engine: Any
) -> tuple[list[list[list[int]]], EngineStats]:
    assembly, model = loaded
    settings = EngineConfig(threads=1, **{"kv_cache_memory": 8 << 20, "max_num_seqs": 16} | engine)
    assembly = replace(assembly, config=replace(assembly.config, engine=settings))
    built = build_engine(assembly, model, assembly.plan_memory(), draft)
    said: list[list[list[int]]] = []

    async def main() -> None:
        built.start(asyncio.get_running_loop())
        for _ in range(rounds):
            seqs = [
                Sequence(next(counter), ids, SamplingParams(max_tokens=NUM_TOKENS, temperature=0)) for ids in prompts
            ]
            found: dict[int, list[int]] = {seq.id: [] for seq in seqs}
            async for outputs in built.submit(seqs):
                for output in outputs:
                    assert output.error is None
                    found[output.seq_id] += [token.token_id for token in output.sampled]
            said.append([found[seq.id] for seq in seqs])
        built.stop()
        assert await asyncio.to_thread(built.join, 30)

    asyncio.run(main())
    built.blocks.check()
    return said, built.stats()


@pytest.mark.parametrize("way", WAYS)
def test_tokens_do_not_depend_on_the_way(
    loaded: tuple[Assembly, Model], expected: list[tuple[list[int], list[int]]], way: str
) -> None:
    said, stats = generate(loaded, [prompt for prompt, _ in expected], 2, **WAYS[way])
    assert said == [[ids for _, ids in expected]] * 2
    assert (stats.prompt_tokens_cached > 0) == (way != "no prefix cache")
    assert stats.draft_tokens > 0 or way != "drafts, all verified"


@pytest.mark.parametrize("way", WAYS)
def test_nor_do_they_with_heads_of_its_own(folder: Path, expected: list[tuple[list[int], list[int]]], way: str) -> None:
    """Of a draft that was not right all is computed again, and the hidden states of what was right come again."""
    options = ModelOptions(model=str(folder), dtype="float32", max_model_len=128)
    assembly = choose(Config(model=options, engine=EngineConfig(threads=1, drafter=("mtp",))), load())
    model = load_model(assembly)
    engine = WAYS[way] | {"drafter": (*WAYS[way].get("drafter", ()), "mtp")}
    said, stats = generate((assembly, model), [ids for ids, _ in expected], 2, load_draft(assembly, model), **engine)
    assert said == [[ids for _, ids in expected]] * 2
    assert stats.drafters[-1].seconds > 0  # on a busy machine no draft may seem to pay, but states are read
    assert stats.drafters[-1].tokens_verified > 0 or way != "drafts, all verified"


def test_the_banner_says_what_states_take(loaded: tuple[Assembly, Model]) -> None:
    assembly, _ = loaded
    memory = assembly.plan_memory()
    lines = describe(assembly, memory)
    assert assembly.kv_spec.num_layers == 1
    assert assembly.state_bytes == 3 * 4 * (160 * 3 + 4 * 16 * 24)
    line = "states  of recurrent layers 17.7 MiB: 768 of 23.6 KiB, up to 256 requests at once, prefixes in the rest"
    assert lines[-1] == line
    assert not any(name.startswith(("mtp.", "model.visual.")) for name in assembly.weights.names())


def test_fewer_run_at_once_where_memory_is_short(loaded: tuple[Assembly, Model]) -> None:
    assembly, model = loaded
    config = replace(assembly.config, engine=EngineConfig(threads=1, kv_cache_memory=400_000))
    assembly = replace(assembly, config=config)
    memory = assembly.plan_memory()
    assert memory.num_bytes + memory.num_state_bytes <= 400_000
    assert memory.num_states == 200_000 // assembly.state_bytes
    assert build_engine(assembly, model, memory).limits.max_num_seqs == memory.num_states // 2
    config = replace(assembly.config, engine=EngineConfig(threads=1, kv_cache_memory=100_000))
    with pytest.raises(ConfigError, match=r"--kv-cache-memory \d+"):
        replace(assembly, config=config).plan_memory()


def test_a_draft_model_must_be_able_to_go_back(folder: Path, tiny_llama: Path) -> None:
    config = Config(model=ModelOptions(model=str(tiny_llama)), draft=DraftOptions(model=str(folder)))
    with pytest.raises(ConfigError, match="recurrent layers"):
        choose(config, load())
