"""Sequences of one batch, each with its adapter: what each says is what the model says into which it is merged."""

from __future__ import annotations

import asyncio
import itertools
import json
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from safetensors.torch import load_file, save_file

from blade import CheckpointError, Config, EngineConfig, ModelOptions, SamplingParams, Sequence
from blade.assembly import build_engine, choose, load_model, make_adapters
from blade.checkpoint.peft import read_adapter
from blade.plugins import load

from .conftest import write_adapter

if TYPE_CHECKING:
    from pathlib import Path

    from blade.nn.lora import Adapter, Adapters

counter = itertools.count(1)
PROMPTS = [[(i * 7 + j * j) % 200 + 10 for j in range(5 + 9 * i)] for i in range(6)]
LAYER = "model.layers.{}.{}"
ATTENTION = {"self_attn.q_proj": (64, 64), "self_attn.v_proj": (32, 64), "self_attn.o_proj": (64, 64)}
MLP = {"mlp.gate_proj": (128, 64), "mlp.up_proj": (128, 64), "mlp.down_proj": (64, 128)}
TARGETS = {
    "attention": {LAYER.format(i, name): shape for i in range(2) for name, shape in ATTENTION.items()},
    "all of one": {LAYER.format(1, name): shape for name, shape in (ATTENTION | MLP).items()},
    "tables": {"lm_head": (272, 64), "model.embed_tokens": (64, 272), LAYER.format(0, "self_attn.q_proj"): (64, 64)},
}


@pytest.fixture(scope="module")
def folders(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The model, its adapters, and the models that they make of it."""
    root = tmp_path_factory.mktemp("lora")
    folders = {"none": tiny_llama}
    for seed, (name, shapes) in enumerate(TARGETS.items()):
        updates = write_adapter(root / name, shapes, rank=3 + seed, seed=seed)
        merged = root / f"{name} merged"
        shutil.copytree(tiny_llama, merged)
        tensors = load_file(merged / "model.safetensors")
        for prefix, (a, b) in updates.items():
            tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"].clone())
            delta = 8 / (3 + seed) * b @ a
            tensors[f"{prefix}.weight"] += delta.T if "embed" in prefix else delta
        save_file(tensors, merged / "model.safetensors")
        folders |= {name: root / name, f"{name} merged": merged}
    return folders


def prepare(folder: Path, **options: Any) -> Any:
    model = ModelOptions(model=str(folder), dtype="float32", max_model_len=256, **options)
    assembly = choose(Config(model=model, engine=EngineConfig(threads=1, kv_cache_memory=4 << 20)), load())
    adapters = make_adapters(assembly)
    return assembly, load_model(assembly, adapters=adapters), adapters


def generate(prepared: Any, chosen: list[Adapter | None], **engine: Any) -> list[list[int]]:
    """Greedy ids of every prompt; `chosen` is repeated over them."""
    assembly, model, adapters = prepared
    config = replace(assembly.config, engine=replace(assembly.config.engine, **engine))
    assembly = replace(assembly, config=config)
    built = build_engine(assembly, model, assembly.plan_memory(), adapters=adapters)
    seqs = [
        Sequence(next(counter), prompt, SamplingParams(max_tokens=24, temperature=0), adapter=adapter)
        for prompt, adapter in zip(PROMPTS, itertools.cycle(chosen), strict=False)
    ]
    for seq in seqs:
        seq.namespace = seq.adapter.namespace if seq.adapter else b""

    async def main() -> None:
        built.start(asyncio.get_running_loop())
        async for outputs in built.submit(seqs):
            assert all(output.error is None for output in outputs)
        built.stop()
        assert await asyncio.to_thread(built.join, 10)

    asyncio.run(main())
    built.blocks.check()
    return [seq.output_ids for seq in seqs]


@pytest.mark.parametrize(
    "engine",
    [
        {},
        {"max_batch_tokens": 12, "max_num_seqs": 6},
        {"drafter": ("suffix",), "adaptive_drafts": False},
        {"drafter": ("lookahead",), "adaptive_drafts": False},
    ],
    ids=["together", "small steps", "drafts", "trees of drafts"],
)
def test_a_mixed_batch_says_what_the_merged_models_say(folders: dict[str, Path], engine: dict[str, Any]) -> None:
    prepared = prepare(folders["none"], lora=("a=b",))
    adapters: Adapters = prepared[2]
    names = ["none", *TARGETS]
    loaded = {name: adapters.make(name, read_adapter(folders[name])) for name in TARGETS}
    expected = {name: generate(prepare(folders[f"{name} merged"]), [None]) for name in TARGETS}
    expected["none"] = generate(prepare(folders["none"]), [None])
    assert len({str(said) for said in expected.values()}) == 4  # they do not say the same
    found = generate(prepared, [loaded.get(name) for name in names], **engine)
    assert found == [expected[names[i % 4]][i] for i in range(len(PROMPTS))]
    assert generate(prepared, [loaded["attention"]]) == expected["attention"]
    assert generate(prepared, [None]) == expected["none"]


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"lm_head": (272, 32)}, r"has a \(272, 32\) update of .*, which is \(272, 64\)"),
        ({"model.embed_tokens": (272, 64)}, r"has a \(272, 64\) update of model\.embed_tokens, which is \(64, 272\)"),
        ({"model.layers.2.mlp.up_proj": (128, 64)}, r"changes model\.layers\.2\.mlp\.up_proj, which is nothing"),
        ({"model.layers.0.mlp.up_proj": (64, 64)}, r"has a \(64, 64\) update of .*up_proj, which is \(128, 64\)"),
    ],
)
def test_an_adapter_of_another_model(
    folders: dict[str, Path], tmp_path: Path, shapes: dict[str, tuple[int, int]], message: str
) -> None:
    adapters: Adapters = prepare(folders["none"], lora=("a=b",))[2]
    write_adapter(tmp_path, shapes)
    with pytest.raises(CheckpointError, match=message):
        adapters.make("x", read_adapter(tmp_path))


def test_over_rounded_weights(folders: dict[str, Path]) -> None:
    prepared = prepare(folders["none"], lora=("a=b",), quantize="int8")
    adapter = prepared[2].make("x", read_adapter(folders["attention"]))
    plain, adapted = generate(prepared, [None]), generate(prepared, [adapter])
    assert plain != adapted
    assert generate(prepared, [None, adapter]) == [(plain, adapted)[i % 2][i] for i in range(len(PROMPTS))]


def test_without_adapters_linears_are_called_without_a_detour(folders: dict[str, Path]) -> None:
    assert prepare(folders["none"])[2] is None
    assert json.loads((folders["attention"] / "adapter_config.json").read_text())["r"] == 3
