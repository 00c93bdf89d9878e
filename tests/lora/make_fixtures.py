"""Makes the adapters in fixtures/ with PEFT, random ones over tiny random models, and notes what PEFT computes.

pip install peft==0.21.2 transformers==5.24.0   # in an environment of their own
python tests/lora/make_fixtures.py
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file

FIXTURES = Path(__file__).parent / "fixtures"
PROMPT = [3, 1, 4, 15, 9, 26, 5, 3, 5, 8]
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 224, "max_position_embeddings": 256,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True}
LLAMA4 = {
    "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 16, "intermediate_size_mlp": 48,
    "no_rope_layers": [1],
}  # fmt: skip
DELTA = {
    "num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"], "rms_norm_eps": 1e-3,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
SHARED = {"shared_expert_intermediate_size": 16}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {  # family, what differs, the adapter
    "dora": (
        "Llama",
        {"attention_bias": True},
        {"r": 3, "use_dora": True, "use_rslora": True, "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"]},
    ),
    "dora-head": ("Llama", {"tie_word_embeddings": True}, {"r": 2, "use_dora": True, "target_modules": ["lm_head"]}),
    "experts": (
        "Qwen3Moe",
        EXPERTS,
        {
            "r": 3,
            "target_modules": ["q_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        },
    ),
    "llama4-experts": (
        "Llama4",
        LLAMA4,
        {
            "r": 2,
            "target_modules": ["v_proj"],
            "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
        },
    ),
    # gates and ups of experts become one parameter, whose rank is twice that of the others
    "qwen3-next": ("Qwen3Next", DELTA | EXPERTS | SHARED, {"r": 3, "target_modules": "all-linear"}),
    "qwen3.5-dora": (
        "Qwen3_5",
        DELTA,
        {
            "r": 2,
            "use_dora": True,
            "target_modules": ["in_proj_qkv", "in_proj_z", "in_proj_a", "out_proj", "q_proj", "o_proj", "up_proj"],
        },
    ),
    "experts-down": ("Qwen3Moe", EXPERTS, {"r": 2, "target_modules": [], "target_parameters": ["experts.down_proj"]}),
}


def make(name: str) -> torch.Tensor:
    """PEFT's logits after each token of the prompt."""
    family, sizes, settings = CASES[name]
    torch.manual_seed(0)
    text = "Text" if family.startswith(("Llama4", "Qwen3_5")) else ""
    config = getattr(transformers, f"{family}{text}Config")(**SIZES | sizes)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for key, parameter in model.named_parameters():
        parameter.data.normal_(mean=float("norm" in key), std=0.2).copy_(parameter.data.bfloat16())
    folder = FIXTURES / name
    model.save_pretrained(folder)
    tensors = {key: tensor.bfloat16() for key, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    adapted = peft.get_peft_model(model, peft.LoraConfig(lora_alpha=6, task_type="CAUSAL_LM", **settings)).eval()
    for key, parameter in adapted.named_parameters():
        if "lora_A" in key or "lora_B" in key:
            parameter.data.normal_(std=0.3)
        elif "magnitude" in key:
            parameter.data.mul_(torch.rand_like(parameter) + 0.5)
    adapted.save_pretrained(folder)
    (folder / "README.md").unlink()
    (folder / "generation_config.json").unlink()
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "x"}))
    with torch.inference_mode():
        return adapted(torch.tensor([PROMPT])).logits[0]


if __name__ == "__main__":
    shutil.rmtree(FIXTURES, ignore_errors=True)
    save_file({name: make(name) for name in CASES}, FIXTURES / "expected.safetensors")
