"""Adapters of every kind as PEFT writes them, DoRA and those of experts too, say what PEFT says (make_fixtures.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from blade import CheckpointError, SamplingParams, Sequence, Step
from blade.checkpoint.peft import read_adapter
from blade.engine.batch import build_batch
from blade.engine.state_cache import with_states

from .test_generation import PROMPTS, generate, prepare

if TYPE_CHECKING:
    from torch import Tensor

    from blade.nn.lora import Adapter

FIXTURES = Path(__file__).parent / "fixtures"
CASES = sorted(path.name for path in FIXTURES.iterdir() if path.is_dir())
EXPECTED = load_file(FIXTURES / "expected.safetensors")
PROMPT = [3, 1, 4, 15, 9, 26, 5, 3, 5, 8]
EXPERTS = "base_model.model.model.layers.0.mlp.experts"


@torch.inference_mode()
def logits(prepared: Any, *chosen: Adapter | None) -> list[Tensor]:
    """After every token of the prompt, of a sequence for each adapter, all in one step."""
    assembly, model, adapters = prepared
    num = len(chosen)
    seqs = [Sequence(i, PROMPT, SamplingParams(max_tokens=1), blocks=[i]) for i in range(num)]
    batch = build_batch(Step(seqs, [len(PROMPT)] * num), 16, assembly.ops.to_device)
    batch.logits_rows = torch.arange(num * len(PROMPT))
    batch.state_in, batch.state_out = torch.full((num,), -1, dtype=torch.int32), torch.arange(num, dtype=torch.int32)
    kv = assembly.attention.allocate(assembly.kv_spec, num)
    kv = with_states(kv, model.config, num, assembly.dtype, assembly.ops.device)
    of_tokens = [adapter for adapter in chosen for _ in PROMPT]
    with adapters.chosen(of_tokens, of_tokens):
        found = model.forward(batch, kv)
    return list(found.chunk(num))


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_peft(case: str) -> None:
    prepared = prepare(FIXTURES / case, lora=("a=b",))
    adapter = prepared[2].make("x", read_adapter(FIXTURES / case))
    (alone,) = logits(prepared, adapter)
    torch.testing.assert_close(alone, EXPECTED[case], rtol=1e-4, atol=1e-4)
    (plain,) = logits(prepared, None)
    assert float((plain - alone).norm() / alone.norm()) > 0.1
    for found, wanted in zip(logits(prepared, None, adapter, None), (plain, alone, plain), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", ["dora", "experts", "qwen3.5-dora"])
def test_over_rounded_weights(case: str) -> None:
    """The lengths of rows are those of what the rounded weights stand for."""
    prepared = prepare(FIXTURES / case, lora=("a=b",), quantize="int8")
    (found,) = logits(prepared, prepared[2].make("x", read_adapter(FIXTURES / case)))
    assert float((found - EXPECTED[case]).norm() / EXPECTED[case].norm()) < 0.05


@pytest.mark.parametrize("case", ["dora", "experts", "qwen3-next", "qwen3.5-dora"])
def test_a_mixed_batch_generates_what_each_alone_does(case: str) -> None:
    prepared = prepare(FIXTURES / case, lora=("a=b",))
    adapter = prepared[2].make("x", read_adapter(FIXTURES / case))
    assert not adapter.replayable
    said = generate(prepared, [None]), generate(prepared, [adapter])
    assert said[0] != said[1]
    assert generate(prepared, [None, adapter]) == [said[i % 2][i] for i in range(len(PROMPTS))]


def rewritten(folder: Path, case: str, tensors: dict[str, Tensor] | None = None, **settings: Any) -> Path:
    config = json.loads((FIXTURES / case / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | settings))
    found = load_file(FIXTURES / case / "adapter_model.safetensors") if tensors is None else tensors
    save_file(found, folder / "adapter_model.safetensors")
    return folder


def test_experts_one_by_one(tmp_path: Path) -> None:
    """As they are named where each expert has linears of its own."""
    tensors = load_file(FIXTURES / "experts" / "adapter_model.safetensors")
    for module, kinds in ((f"{EXPERTS}.base_layer", ("gate_proj", "up_proj")), (EXPERTS, ("down_proj",))):
        a, b = (tensors.pop(f"{module}.lora_{side}.weight") for side in "AB")
        for expert in range(4):
            for kind, rows in zip(kinds, b.chunk(len(kinds)), strict=True):
                prefix = f"{EXPERTS}.{expert}.{kind}"
                tensors[f"{prefix}.lora_A.weight"] = a[3 * expert : 3 * expert + 3].clone()
                tensors[f"{prefix}.lora_B.weight"] = rows[:, expert::4].clone()
    prepared = prepare(FIXTURES / "experts", lora=("a=b",))
    (found,) = logits(prepared, prepared[2].make("x", read_adapter(rewritten(tmp_path, "experts", tensors))))
    torch.testing.assert_close(found, EXPECTED["experts"], rtol=1e-4, atol=1e-4)


SEEING = [  # a case, what it is inside a model that sees or hears, where config.json has it, and its names
    ("qwen3.5-dora", "Qwen3_5ForConditionalGeneration", ["text_config"], "model.language_model.", ""),
    ("experts", "Qwen3VLMoeForConditionalGeneration", ["text_config"], "model.language_model.", ""),
    (
        "experts",
        "Qwen3OmniMoeForConditionalGeneration",
        ["text_config", "thinker_config"],
        "thinker.model.",
        "thinker.",
    ),
]


@pytest.mark.parametrize(("case", "architecture", "sections", "prefix", "root"), SEEING)
def test_names_with_and_without_eyes(
    tmp_path: Path, case: str, architecture: str, sections: list[str], prefix: str, root: str
) -> None:
    """A model that sees or hears as well has longer names for its text model, whichever of the two was trained."""
    config = json.loads((FIXTURES / case / "config.json").read_text())
    for section in sections:
        config = {section: config}
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": [architecture]}))
    tensors = load_file(FIXTURES / case / "model.safetensors")
    save_file({longer_name(name, prefix, root): x for name, x in tensors.items()}, tmp_path / "model.safetensors")
    updates = read_adapter(FIXTURES / case)
    longer = {longer_name(name, prefix, root): update for name, update in updates.items()}
    for folder, names in ((tmp_path, updates), (tmp_path, longer), (FIXTURES / case, longer)):
        prepared = prepare(folder, lora=("a=b",))
        (found,) = logits(prepared, prepared[2].make("x", names))
        torch.testing.assert_close(found, EXPECTED[case], rtol=1e-4, atol=1e-4)
    with pytest.raises(CheckpointError, match=r"under two names, with and without 'language_model\.'"):
        prepared[2].make("x", updates | longer)


def longer_name(name: str, prefix: str, root: str) -> str:
    return prefix + name.removeprefix("model.") if name.startswith("model.") else root + name


def test_over_experts_that_lie_the_other_way(tmp_path: Path) -> None:
    """In the files that Qwen publishes of Qwen3-VL, and not in transformers, whose shapes the adapter has."""
    tensors = load_file(FIXTURES / "experts" / "model.safetensors")
    stacks = {
        kind: torch.stack([tensors.pop(f"model.layers.0.mlp.experts.{i}.{kind}_proj.weight") for i in range(4)])
        for kind in ("gate", "up", "down")
    }
    fused = {"gate_up_proj": torch.cat((stacks["gate"], stacks["up"]), dim=1), "down_proj": stacks["down"]}
    tensors |= {f"model.layers.0.mlp.experts.{name}": stack.mT.contiguous() for name, stack in fused.items()}
    text = json.loads((FIXTURES / "experts" / "config.json").read_text())
    seeing = {"architectures": ["Qwen3VLMoeForConditionalGeneration"], "text_config": text}
    (tmp_path / "config.json").write_text(json.dumps(seeing))
    save_file(tensors, tmp_path / "model.safetensors")
    prepared = prepare(tmp_path, lora=("a=b",))
    (found,) = logits(prepared, prepared[2].make("x", read_adapter(FIXTURES / "experts")))
    torch.testing.assert_close(found, EXPECTED["experts"], rtol=1e-4, atol=1e-4)


A, B = torch.zeros(8, 16), torch.zeros(32, 8)


@pytest.mark.parametrize(
    ("tensors", "settings", "message"),
    [
        (
            {"A": A, "B": B},
            {"r": 3},
            r"of \(32, 16\) matrices under .*, which has 4 experts, .*; by adapter_config.json each is of rank 3",
        ),
        (
            {"A": A, "B": B},
            {"rank_pattern": {"d.*": 2}},
            "pattern 'd.*' in rank_pattern is not served where experts are",
        ),
        ({"A": A, "B": B}, {"rank_pattern": {"experts.down_proj": 1}}, "each is of rank 1"),
        ({"A": A, "B": B}, {"lora_alpha": 1e308}, "the scale of .*, of rank [0-9]+, is [0-9.]+e\\+307"),
        ({"A": A, "B": B}, {"r": 0}, "the scale of 'model.layers.0.mlp.experts.gate_up_proj', of rank 0, is nan"),
        (
            {"A": A[:, :8], "B": B},
            {},
            r"an update of rank 8, of all experts, of \(32, 8\) matrices under .*32 to 16 and back\.",
        ),
        ({"A": A, "B": B[:, :4]}, {}, r"has lora_A \[8, 16\] and lora_B \[32, 4\]"),
        ({"A": A, "B": B}, {"use_dora": True}, "has no lora_magnitude_vector; use_dora is True"),
    ],
)
def test_updates_of_other_experts(
    tmp_path: Path, tensors: dict[str, Tensor], settings: dict[str, Any], message: str
) -> None:
    named = {f"{EXPERTS}.lora_{side}.weight": tensor.contiguous() for side, tensor in tensors.items()}
    prepared = prepare(FIXTURES / "experts", lora=("a=b",))
    with pytest.raises(CheckpointError, match=message):
        prepared[2].make("x", read_adapter(rewritten(tmp_path, "experts-down", named, **settings)))


@pytest.mark.parametrize(
    ("magnitude", "settings", "message"),
    [
        (torch.ones(8), {}, r"has lora_magnitude_vector \[8\], and lora_B \[224, 2\]"),
        (torch.ones(224), {"use_dora": False}, "has a lora_magnitude_vector; use_dora is False"),
        (torch.ones(224, 1), {}, "no part of a linear's update"),
    ],
)
def test_magnitudes_that_do_not_belong(
    tmp_path: Path, magnitude: Tensor, settings: dict[str, Any], message: str
) -> None:
    tensors = load_file(FIXTURES / "dora-head" / "adapter_model.safetensors")
    tensors["base_model.model.lm_head.lora_magnitude_vector"] = magnitude
    with pytest.raises(CheckpointError, match=message):
        read_adapter(rewritten(tmp_path, "dora-head", tensors, **settings))
