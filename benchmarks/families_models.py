"""A random checkpoint of each model family, of 0.2 to 0.4 billion parameters, in bfloat16 or a weight format."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

sys.path.append(str(Path(__file__).parents[1] / "tests" / "models"))
from quantised import formats, quantised

from blade.testing import TensorWeights

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

HIDDEN, INNER, VOCAB, HEADS = 1024, 2816, 32000, 16
GROUP = 128  # numbers that share a scale, in formats that leave it to the checkpoint
STD = 0.02  # of all matrices
MIXTURE = {"num_hidden_layers": 8, "num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 512}
SHARED = {"shared_expert_intermediate_size": 512}
DELTA = {
    "head_dim": 128, "num_attention_heads": 8, "linear_num_key_heads": 4, "linear_num_value_heads": 8,
    "linear_key_head_dim": 128, "linear_value_head_dim": 128,
}  # fmt: skip
LLAMA4 = {
    "num_hidden_layers": 8, "head_dim": 64, "num_local_experts": 16, "intermediate_size": 512,
    "intermediate_size_mlp": INNER, "attention_chunk_size": 8192,
}  # fmt: skip
EXP = {
    "hc_count": 4, "hc_lowrank": 64, "ple_layer_ids": [2], "ngram_vocab_size_base": 4096, "split_ngram_parts": 16,
    "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 128, "indexer_budget": 512,
    "indexer_compress_ratio": 16, "eos_token_id": 1,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {  # by transformers' name: what differs
    "Llama": {},
    "Llama4": LLAMA4,
    "Qwen1": {},
    "Qwen2": {},
    "Qwen2Moe": MIXTURE | SHARED,
    "Qwen3": {"head_dim": 64},
    "Qwen3Moe": MIXTURE | {"head_dim": 64},
    "Qwen3Next": MIXTURE | SHARED | DELTA,
    "Qwen3_5": DELTA,
    "Qwen3_5Moe": MIXTURE | SHARED | DELTA,
    "Qwen4Exp": MIXTURE | SHARED | DELTA | EXP,
}
FORMATS = formats(GROUP)
Shapes = dict[str, tuple[int, ...]]


def write_checkpoints(family: str, kinds: list[str], folder: Path) -> dict[str, Path]:
    """A folder for each of `kinds`: "bf16", or a name of FORMATS."""
    config, shapes = _qwen1() if family == "Qwen1" else _transformers(family)
    torch.manual_seed(0)
    tensors = {name: _numbers(name, shape) for name, shape in shapes.items()}
    folders = {}
    for kind in kinds:
        made, settings = tensors, {}
        if kind != "bf16":
            made, _ = quantised(dict(tensors), FORMATS[kind].write)
            settings = {"quantization_config": FORMATS[kind].settings}
        folders[kind] = folder / f"{family}-{kind}"
        folders[kind].mkdir()
        save_file(made, folders[kind] / "model.safetensors")
        (folders[kind] / "config.json").write_text(json.dumps(config | settings))
    return folders


def _numbers(name: str, shape: tuple[int, ...]) -> Tensor:
    if len(shape) > 1:
        return torch.randn(shape).mul_(STD).bfloat16()
    return torch.full(shape, {"A_log": -2.0, "bias": 0.0}.get(name.rpartition(".")[2], 1.0)).bfloat16()


def _transformers(family: str) -> tuple[dict[str, Any], Shapes]:
    """config.json and the shapes of what blade reads, experts one by one."""
    import transformers

    from blade.plugins import load

    text = "Text" if family.startswith(("Qwen3_5", "Qwen4", "Llama4")) else ""
    common = {
        "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": 16, "num_attention_heads": HEADS,
        "num_key_value_heads": 4, "vocab_size": VOCAB, "max_position_embeddings": 4096, "pad_token_id": None,
    }  # fmt: skip
    config = getattr(transformers, f"{family}{text}Config")(**common | FAMILIES[family])
    config.architectures = [f"{family}ForCausalLM"]
    with torch.device("meta"):
        model = getattr(transformers, f"{family}ForCausalLM")(config)
    architecture = load().registry("register_models").create(config.architectures[0])
    state = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    weights = TensorWeights(state)  # integers are Qwen4-Exp's, and follow from its config
    seen = getattr(architecture, "weights", lambda config, weights: weights)(config.to_dict(), weights)
    return config.to_dict(), {name: tuple(seen.shape(name)) for name in seen.names()}


def _qwen1() -> tuple[Mapping[str, Any], Shapes]:
    """Of the first Qwen, which transformers does not have."""
    num_layers = 16
    config = {
        "architectures": ["QWenLMHeadModel"], "model_type": "qwen", "hidden_size": HIDDEN,
        "intermediate_size": 2 * INNER, "kv_channels": HIDDEN // HEADS, "num_attention_heads": HEADS,
        "num_hidden_layers": num_layers, "seq_length": 4096, "vocab_size": VOCAB,
    }  # fmt: skip
    shapes: Shapes = {"transformer.wte.weight": (VOCAB, HIDDEN), "lm_head.weight": (VOCAB, HIDDEN)}
    shapes["transformer.ln_f.weight"] = (HIDDEN,)
    layer: Shapes = {
        "ln_1.weight": (HIDDEN,), "ln_2.weight": (HIDDEN,), "attn.c_attn.weight": (3 * HIDDEN, HIDDEN),
        "attn.c_attn.bias": (3 * HIDDEN,), "attn.c_proj.weight": (HIDDEN, HIDDEN), "mlp.w1.weight": (INNER, HIDDEN),
        "mlp.w2.weight": (INNER, HIDDEN), "mlp.c_proj.weight": (HIDDEN, INNER),
    }  # fmt: skip
    return config, shapes | {
        f"transformer.h.{i}.{name}": shape for i in range(num_layers) for name, shape in layer.items()
    }
