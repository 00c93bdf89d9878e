"""A folder of Hugging Face's as a GGUF file, its tensors changed as llama.cpp's converter changes them.

Names are the gguf package's own. tests/models/test_gguf_converted.py holds blade to files that the converter made.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import gguf
import torch
from safetensors.torch import load_file

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "Llama4ForCausalLM": "llama4",
    "Qwen3MoeForCausalLM": "qwen3moe",
    "Qwen3NextForCausalLM": "qwen3next",
    "Qwen3_5ForCausalLM": "qwen35",
}
KEYS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "ssm.conv_kernel": "linear_conv_kernel_dim",
    "ssm.state_size": "linear_key_head_dim",
    "ssm.group_count": "linear_num_key_heads",
    "ssm.time_step_rank": "linear_num_value_heads",
}
EXPERT = re.compile(r"(.+\.experts)\.0\.(\w+)\.weight")


def write_gguf(folder: Path, path: Path, in_blocks: bool = False) -> None:
    """`in_blocks`: matrices but routers in Q8_0, where rows divide by 32."""
    config = json.loads((folder / "config.json").read_text())
    arch = ARCHITECTURES[config["architectures"][0]]
    writer = gguf.GGUFWriter(path, arch)
    for key, value in metadata(config).items():
        kinds = {bool: gguf.GGUFValueType.BOOL, int: gguf.GGUFValueType.UINT32, float: gguf.GGUFValueType.FLOAT32}
        if isinstance(value, list):
            writer.add_array(f"{arch}.{key}", value)
        else:
            writer.add_key_value(f"{arch}.{key}", value, kinds[type(value)])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{i}" for i in range(config["vocab_size"])])
    plain = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    tensors = converted(plain, config, arch)
    known = next(known for known, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(known, config["num_hidden_layers"])
    for name, tensor in tensors.items():
        stored = names.get_name(name.replace("dt_bias", "dt_proj.bias"), try_suffixes=(".weight", ".bias"))
        assert stored is not None, name
        numbers = tensor.contiguous().numpy()
        if in_blocks and tensor.dim() > 1 and tensor.shape[-1] % 32 == 0 and "gate_inp" not in stored:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(stored, gguf.quants.quantize(numbers, kind), raw_dtype=kind)
        else:
            writer.add_tensor(stored, numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def metadata(config: dict[str, Any]) -> dict[str, Any]:
    found = {key: config[name] for key, name in KEYS.items() if name in config}
    rope = config["rope_parameters"]
    found["rope.freq_base"] = float(rope["rope_theta"])
    found["rope.dimension_count"] = int(rope.get("partial_rotary_factor", 1) * config["head_dim"])
    if "linear_num_value_heads" in config:
        found["ssm.inner_size"] = config["linear_num_value_heads"] * config["linear_value_head_dim"]
        found["attention.recurrent_layers"] = [kind == "linear_attention" for kind in config["layer_types"]]
    if "num_local_experts" in config:
        found["expert_count"] = config["num_local_experts"]
    if "intermediate_size_mlp" in config:  # Llama 4
        found["expert_feed_forward_length"] = config["intermediate_size"]
        found["feed_forward_length"] = config["intermediate_size_mlp"]
    return found


def converted(tensors: dict[str, Tensor], config: dict[str, Any], arch: str) -> dict[str, Tensor]:
    """Under Hugging Face's names still, but for those that it has none for."""
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if ".experts." in name:
            out |= experts(name, tensor, tensors)
        elif ".linear_attn." in name:
            out |= delta(name, tensor, config, arch)
        elif arch == "llama" and re.search(r"\.[qk]_proj\.", name):
            heads = config["num_attention_heads" if ".q_proj." in name else "num_key_value_heads"]
            out[name] = tensor.view(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
        else:
            out[name] = tensor
    if "linear_num_value_heads" in config:
        for name in out:
            if name.endswith("norm.weight") and "linear_attn" not in name:
                out[name] = out[name] + 1
            elif name.endswith("A_log"):
                out[name] = -out[name].exp()
    return out


def experts(name: str, tensor: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """All of a layer in one tensor."""
    if name.endswith("experts.gate_up_proj"):  # Llama 4's, transposed
        gate, up = tensor.transpose(1, 2).chunk(2, dim=1)
        prefix = name.removesuffix(".gate_up_proj")
        return {f"{prefix}.gate_proj.weight": gate, f"{prefix}.up_proj.weight": up}
    if name.endswith("experts.down_proj"):
        return {f"{name}.weight": tensor.transpose(1, 2)}
    match = EXPERT.fullmatch(name)
    if match is None:
        return {}
    prefix, half = match.groups()
    num = sum(each.startswith(prefix) and each.endswith(f"{half}.weight") for each in tensors)
    stack = torch.stack([tensors[f"{prefix}.{i}.{half}.weight"] for i in range(num)])
    return {f"{prefix}.{half}.weight": stack}


def delta(name: str, tensor: Tensor, config: dict[str, Any], arch: str) -> dict[str, Tensor]:
    """Of a recurrent layer."""
    num_k, num_v = config["linear_num_key_heads"], config["linear_num_value_heads"]
    key, value = config["linear_key_head_dim"], config["linear_value_head_dim"]
    if name.endswith("in_proj_qkvz.weight"):
        each = [key, key, num_v // num_k * value, num_v // num_k * value]
        q, k, v, z = (part.flatten(0, 1) for part in tensor.view(num_k, sum(each), -1).split(each, dim=1))
        prefix = name.removesuffix("qkvz.weight")
        return {f"{prefix}qkv.weight": torch.cat([q, k, v]), f"{prefix}z.weight": z}
    if name.endswith("conv1d.weight"):
        tensor = tensor.squeeze(1)
    if arch == "qwen3next":
        return {name: tensor}

    def tiled(values: Tensor) -> Tensor:
        heads = values.view(num_k, num_v // num_k, -1, *values.shape[1:])
        return heads.transpose(0, 1).reshape(values.shape)

    if name.endswith(("in_proj_qkv.weight", "conv1d.weight")):
        keys = 2 * num_k * key
        return {name: torch.cat([tensor[:keys], tiled(tensor[keys:])])}
    if name.endswith("out_proj.weight"):
        return {name: tiled(tensor.T).T}
    return {name: tensor if name.endswith("norm.weight") else tiled(tensor)}
