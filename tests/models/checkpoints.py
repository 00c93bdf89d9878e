"""Tiny random checkpoints made by transformers, and what it computes with them: the oracle of the model tests."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from blade.testing import TensorWeights

if TYPE_CHECKING:
    from torch import Tensor

LENGTHS = (60, 23, 1, 41, 96)  # tokens of the prompts
SHORT = {"max_position_embeddings": 64}  # tokens; the rope stretches it

LINEAR = {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.5}
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
SECTIONS = {"mrope_section": [3, 2, 3]}  # pairs of channels; of text all have the same position
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1000.0} | SECTIONS}
SLIDING = {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1}
MIXTURE = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 48}
DELTA = {
    "rms_norm_eps": 1e-3,  # what is almost nothing is not normalised up, rounding errors and all
    "num_hidden_layers": 4,
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
}
LLAMA4 = {"num_hidden_layers": 4, "head_dim": 32, "num_local_experts": 4, "intermediate_size_mlp": 112}
UNTIED = {"head_dim": 32, "tie_word_embeddings": False}
MLLAMA = {"num_hidden_layers": 5, "cross_attention_layers": [1, 4], "pad_token_id": 0}
LINEAR_FIRST = ["linear_attention", "full_attention", "linear_attention", "linear_attention"]
VISION = {
    "Qwen3_5": {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 64},
    "Qwen4Exp": {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 64},
    "Qwen2VL": {"depth": 1, "hidden_size": 64, "embed_dim": 16, "num_heads": 2},
    "Qwen2_5_VL": {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 64},
    "Qwen3VL": {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 64}
    | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16},
    "Mllama": {"num_hidden_layers": 1, "num_global_layers": 1, "hidden_size": 16, "intermediate_size": 16}
    | {"attention_heads": 2, "vision_output_dim": 32, "image_size": 28, "intermediate_layers_indices": [0]},
    "Llama4": {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 64, "num_attention_heads": 2}
    | {"vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16, "image_size": 28},
}
VISION |= {"Qwen2_5OmniThinker": VISION["Qwen2_5_VL"], "Qwen3OmniMoeThinker": VISION["Qwen3VL"]}
HEARING = {"encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16, "d_model": 16, "output_dim": 64}
SHARED = {"shared_expert_intermediate_size": 80}
STREAMS = {"hc_count": 3, "hc_lowrank": 32}
INDEXER = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 32, "indexer_compress_ratio": 8}
SPARSE = {"indexer_n_heads": 8, "indexer_budget": 24, "indexer_compress_ratio": 4}  # of many heads one always fits
NGRAMS = {"ple_layer_ids": [3, 1], "heads_per_ngram": 2, "ngram_vocab_size_base": 101, "split_ngram_parts": 4}
EXP = MIXTURE | SHARED | DELTA | STREAMS | INDEXER | {"indexer_budget": 128, "eos_token_id": [24, 9]}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama grouped untied": ("Llama", {}),
    "llama ungrouped tied": ("Llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama wide heads": ("Llama", {"head_dim": 48, "num_key_value_heads": 1}),
    "llama linear": ("Llama", SHORT | {"rope_parameters": LINEAR}),
    "llama dynamic": ("Llama", SHORT | {"rope_parameters": LINEAR | {"rope_type": "dynamic"}}),
    "llama llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "llama yarn": ("Llama", SHORT | {"rope_parameters": YARN}),
    "llama yarn scales": ("Llama", SHORT | {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.2}}),
    "llama yarn whole": ("Llama", SHORT | {"rope_parameters": YARN | {"truncate": False, "attention_factor": 1.3}}),
    "qwen2 tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2 sliding": ("Qwen2", SLIDING),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "qwen3 biases": ("Qwen3", {"head_dim": 32, "attention_bias": True, "tie_word_embeddings": True}),
    "qwen3 sliding": ("Qwen3", {"head_dim": 32} | SLIDING),
    "qwen2 moe": ("Qwen2Moe", MIXTURE | SHARED),
    "qwen2 moe fused": ("Qwen2Moe", MIXTURE | SHARED | {"norm_topk_prob": True}),
    "qwen3 moe": ("Qwen3Moe", MIXTURE | {"head_dim": 32}),
    "qwen3 moe dense first": ("Qwen3Moe", MIXTURE | {"head_dim": 32, "mlp_only_layers": [0], "norm_topk_prob": True}),
    "qwen3 moe sliding": (
        "Qwen3Moe",
        MIXTURE | {"head_dim": 32, "decoder_sparse_step": 2, "use_sliding_window": True, "sliding_window": 12},
    ),
    "qwen3 next": ("Qwen3Next", MIXTURE | SHARED | DELTA),
    "qwen3 next dense": ("Qwen3Next", MIXTURE | SHARED | DELTA | {"mlp_only_layers": [0, 1, 2, 3]}),
    "qwen3.5": ("Qwen3_5", DELTA | {"linear_conv_kernel_dim": 3}),
    "qwen3.5 tied": ("Qwen3_5", DELTA | {"tie_word_embeddings": True, "attention_bias": True}),
    "qwen3.5 vision": ("Qwen3_5", DELTA | {"tie_word_embeddings": True}),
    "qwen3.5 moe vision": ("Qwen3_5Moe", MIXTURE | SHARED | DELTA),
    "qwen2 vl vision": ("Qwen2VL", MROPE),
    "qwen2 vl sliding vision": ("Qwen2VL", MROPE | SLIDING),
    "qwen2.5 vl nested vision": ("Qwen2_5_VL", MROPE | {"tie_word_embeddings": True}),
    "qwen2.5 vl yarn vision": ("Qwen2_5_VL", SHORT | {"rope_parameters": YARN | SECTIONS}),
    "qwen2.5 omni vision": ("Qwen2_5OmniThinker", MROPE),
    "qwen3 vl vision": ("Qwen3VL", {"head_dim": 32, "tie_word_embeddings": True} | MROPE),
    "qwen3 vl moe vision": ("Qwen3VLMoe", MIXTURE | UNTIED | {"moe_intermediate_size": 32} | MROPE),
    "qwen3 vl moe fused vision": ("Qwen3VLMoe", MIXTURE | UNTIED | {"moe_intermediate_size": 64} | MROPE),
    "qwen3 omni vision": ("Qwen3OmniMoeThinker", MIXTURE | UNTIED | MROPE),
    "llama vision": ("Mllama", MLLAMA | {"rope_parameters": LLAMA3}),
    "llama nested vision": ("Mllama", MLLAMA | {"num_key_value_heads": 4}),
    "llama text of vision alone": ("Mllama", MLLAMA),
    "llama4": ("Llama4", LLAMA4),
    "llama4 top 2": ("Llama4", LLAMA4 | {"num_experts_per_tok": 2, "rope_parameters": LLAMA3, "use_qk_norm": False}),
    "llama4 sharpened": ("Llama4", LLAMA4 | {"floor_scale": 10, "attn_scale": 0.5, "attention_bias": True}),
    "llama4 chunks": ("Llama4", LLAMA4 | {"attention_chunk_size": 13, "floor_scale": 20}),
    "llama4 vision": ("Llama4", LLAMA4 | {"interleave_moe_layer_step": 2}),
    "qwen3.5 moe": ("Qwen3_5Moe", MIXTURE | SHARED | DELTA | {"layer_types": LINEAR_FIRST}),
    "qwen3.5 moe fused": ("Qwen3_5Moe", MIXTURE | SHARED | DELTA),
    "qwen4 exp": ("Qwen4Exp", EXP),
    "qwen4 exp ngrams": ("Qwen4Exp", EXP | NGRAMS | {"output_gate_type": "sigmoid"}),
    "qwen4 exp sparse": ("Qwen4Exp", EXP | NGRAMS | SPARSE),
    "qwen4 exp sparse wide": ("Qwen4Exp", EXP | SPARSE | {"indexer_compress_ratio": 24, "indexer_head_dim": 48}),
    "qwen4 exp long ngrams vision": (
        "Qwen4Exp",
        EXP | NGRAMS | {"ngram_size": 4, "ple_embed_dim": 36, "ple_conv_kernel_size": 2, "eos_token_id": 10},
    ),
}


@dataclass
class Reference:
    """A checkpoint, prompts, and transformers' logits after each of their tokens."""

    config: dict[str, Any]  # config.json's content
    weights: TensorWeights
    prompts: list[list[int]]
    logits: list[Tensor]  # [L, vocab_size] float32 each


def make_reference(case: str) -> Reference:
    import transformers

    family, settings = CASES[case]
    config, kind = _config(family, settings), "ForCausalLM"
    if case.endswith("vision"):
        kind = "ForConditionalGeneration"
        tied = getattr(config, "tie_word_embeddings", False)
        sections = {"text_config": config.to_dict(), "vision_config": VISION[family.removesuffix("Moe")]}
        if family.endswith("Thinker"):
            sections["audio_config"] = HEARING
        config = getattr(transformers, f"{family}Config")(**sections, tie_word_embeddings=tied)
    config.architectures = [family + kind]
    torch.manual_seed(0)
    model = getattr(transformers, family + kind)(config).eval()
    hybrid, streams = (hasattr(config.get_text_config(), key) for key in ("linear_num_key_heads", "hc_count"))
    std = 0.12 if hybrid and not streams else 0.2  # of what is read from streams all is normalised
    for name, parameter in model.named_parameters():
        parameter.data.normal_(mean=_mean(name, hybrid) if parameter.dim() == 1 else 0.0, std=std)
    as_held = {"fused", "nested"}.intersection(case.split())
    tensors = dict(model.state_dict()) if as_held else _published(model)
    if getattr(config, "tie_word_embeddings", False):
        tensors.pop("lm_head.weight", None)
    model = model.language_model if case == "llama4 vision" else model  # the whole fails without images
    prompts = [torch.randint(config.get_text_config().vocab_size, (length,)).tolist() for length in LENGTHS]
    found, tensors = _as_published(case, config.to_dict(), tensors)
    return Reference(found, TensorWeights(tensors), prompts, [_logits(model, prompt) for prompt in prompts])


def _config(family: str, settings: dict[str, Any]) -> Any:
    import transformers

    family = family.removesuffix("Thinker")
    text = "Text" if family in VISION or family.startswith(("Qwen3_5", "Qwen3VL", "Qwen2_5Omni", "Qwen3Omni")) else ""
    return getattr(transformers, f"{family}{text}Config")(
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        vocab_size=199,
        **{"num_hidden_layers": 3, "num_key_value_heads": 2, "max_position_embeddings": 128} | settings,
    )


def _mean(name: str, hybrid: bool) -> float:
    """Of a vector's numbers: what leaves logits that say something, and that float32 can hold. Recurrent layers forget
    slowly, so that much is left to be normalised."""
    if name.endswith("A_log"):
        return -2.0
    return 0.0 if hybrid and "linear_attn" not in name else 1.0  # norms add 1, where there are recurrent layers


def _published(model: Any) -> dict[str, Tensor]:
    """The tensors as checkpoints have them: transformers keeps a layer's experts in one."""
    from safetensors.torch import load_file

    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_file(Path(folder) / "model.safetensors")


def _as_published(
    case: str, config: dict[str, Any], tensors: dict[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """As Qwen's own files have them and transformers no longer writes them: the first that see have all keys side by
    side, all experts of a layer are transposed, and what thinks has what talks beside it."""
    if case.startswith("qwen2 vl"):
        text = config.pop("text_config")
        theta = text.pop("rope_parameters")["rope_theta"]
        config = text | config | {"rope_theta": theta, "rope_scaling": {"type": "mrope"} | SECTIONS}
    if case == "qwen3 vl moe vision":
        experts = {name: x.mT.contiguous() for name, x in tensors.items() if ".mlp.experts." in name}
        return config, tensors | experts
    if "omni" in case:
        architecture = config["architectures"][0].replace("Thinker", "")
        whole = {f"thinker.{name.removeprefix('thinker.')}": tensor for name, tensor in tensors.items()}
        whole["talker.norm.weight"] = torch.ones(2)
        return {"architectures": [architecture], "thinker_config": config}, whole
    return config, tensors


@torch.inference_mode()
def _logits(model: Any, prompt: list[int]) -> Tensor:
    """Beyond the trained context one token per pass, as when they are generated: see blade.nn.DynamicRope."""
    import transformers

    ids, trained = torch.tensor([prompt]), model.config.get_text_config().max_position_embeddings
    parts = [ids[:, :trained], *(ids[:, i : i + 1] for i in range(trained, len(prompt)))]
    renamed = "cache" in inspect.signature(model.forward).parameters  # in transformers 5.24
    cache = {"cache" if renamed else "past_key_values": transformers.DynamicCache(config=model.config)}
    return torch.cat([model(part, **cache, use_cache=True).logits[0] for part in parts])
