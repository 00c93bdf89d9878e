"""Mixtures of experts from GGUF files, whose experts share tensors, and text models of models that see: the logits are
those of the original."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from checkpoints import Reference, make_reference
from stepper import Stepper, all_together

from blade.checkpoint.open import Checkpoint, open_checkpoint

NAMES = {  # Hugging Face's and llama.cpp's
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate": "ffn_gate_inp", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp", "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp", "mlp.shared_expert.down_proj": "ffn_down_shexp",
}  # fmt: skip
NUM_EXPERTS = 6


def convert(reference: Reference, arch: str, path: Path, kind: gguf.GGMLQuantizationType | None) -> Checkpoint:
    """As llama.cpp's converter does it; `kind`: of the experts."""
    config, writer = reference.config, gguf.GGUFWriter(path, arch)
    counts = {
        "block_count": "num_hidden_layers", "context_length": "max_position_embeddings",
        "embedding_length": "hidden_size", "feed_forward_length": "intermediate_size",
        "attention.head_count": "num_attention_heads", "attention.head_count_kv": "num_key_value_heads",
        "expert_used_count": "num_experts_per_tok",
    }  # fmt: skip
    for key, source in counts.items():
        if source in config:
            writer.add_uint32(f"{arch}.{key}", config[source])
    if "num_experts_per_tok" in config:
        writer.add_uint32(f"{arch}.expert_count", NUM_EXPERTS)
    if "vl" in arch:
        writer.add_array(f"{arch}.rope.dimension_sections", [3, 2, 3, 0])
    if "head_dim" in config:
        writer.add_uint32(f"{arch}.attention.key_length", config["head_dim"])
    writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", config["rms_norm_eps"])
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    writer.add_array("tokenizer.ggml.token_type", [1, 1])
    experts: dict[str, dict[int, torch.Tensor]] = {}
    for name, tensor in reference.weights.tensors.items():
        match = re.fullmatch(r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.(gate|up|down)_proj\.weight", name)
        if match is None:
            writer.add_tensor(
                gguf_name(name), tensor.squeeze().numpy() if "shared_expert_gate" in name else tensor.numpy()
            )
        else:
            experts.setdefault(f"blk.{match[1]}.ffn_{match[3]}_exps.weight", {})[int(match[2])] = tensor
    for name, parts in experts.items():
        array = torch.stack([parts[i] for i in range(NUM_EXPERTS)]).numpy()
        if kind is None or array.shape[-1] % 32:
            writer.add_tensor(name, array)
        else:
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return open_checkpoint(path)


def gguf_name(name: str) -> str:
    module, _, kind = name.rpartition(".")
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
    return f"blk.{layer[1]}.{NAMES[layer[2]]}.{kind}" if layer else f"{NAMES[module]}.{kind}"


def error(reference: Reference, checkpoint: Checkpoint) -> float:
    seen: Any = replace(reference, config=checkpoint.config, weights=checkpoint.weights)  # type: ignore[arg-type]
    found = Stepper(seen).run(all_together([len(prompt) for prompt in reference.prompts], seed=0))
    return max(float((a - b).abs().max()) for a, b in zip(found, reference.logits, strict=True))


@pytest.mark.parametrize(
    ("case", "arch"),
    [
        ("qwen2 moe", "qwen2moe"),
        ("qwen2 tied", "qwen2vl"),
        ("qwen3", "qwen3vl"),
        ("qwen3 moe dense first", "qwen3moe"),
        ("qwen3 moe dense first", "qwen3vlmoe"),
    ],
)
def test_logits_equal_those_of_the_original(tmp_path: Path, case: str, arch: str) -> None:
    reference = make_reference(case)
    checkpoint = convert(reference, arch, tmp_path / "tiny.gguf", None)
    assert error(reference, checkpoint) < 1e-4
    assert checkpoint.num_params == sum(tensor.numel() for tensor in reference.weights.tensors.values())


def test_experts_are_served_in_their_blocks(tmp_path: Path) -> None:
    reference = make_reference("qwen2 moe")
    checkpoint = convert(reference, "qwen2moe", tmp_path / "tiny.gguf", gguf.GGMLQuantizationType.Q8_0)
    assert checkpoint.blocks is not None
    assert checkpoint.blocks.block_formats == ["Q8_0"]
    name = "model.layers.1.mlp.experts.4.up_proj.weight"
    exact = reference.weights.tensors[name]
    assert checkpoint.blocks.blocks(name).shape == tuple(exact.shape)
    torch.testing.assert_close(checkpoint.weights.get(name), exact, rtol=0, atol=0.02)
    assert 1e-4 < error(reference, checkpoint) < float(reference.logits[0].std())
