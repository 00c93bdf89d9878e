"""The fixtures, opened and served: what `make_fixtures.py` made of one tiny model by many tools."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

import blade_auto_round
import blade_awq
import blade_bitsandbytes
import blade_compressed_tensors
import blade_fcfs
import blade_fp8
import blade_gptq
import blade_hqq
import blade_llama
import blade_local
import blade_mlx
import blade_modelopt
import blade_native
import blade_qwen
import blade_rtn
import blade_torchao
from blade import Config, ModelOptions, SamplingParams, Sequence, Step
from blade.assembly import Assembly, choose, load_model
from blade.checkpoint.safetensors import SafetensorsWeights
from blade.engine.batch import build_batch
from blade.nn import GroupedQuantization, dequantize
from blade.plugins import Plugins
from blade.quantization import choose_form, quantization_settings
from blade_native.attention import PagedAttention
from blade_native.reference import TorchOps

if TYPE_CHECKING:
    from torch import Tensor

FIXTURES = Path(__file__).parent / "fixtures"
CASES = sorted(path.name for path in FIXTURES.iterdir() if path.is_dir())
EXPECTED = load_file(FIXTURES / "expected.safetensors")
PROMPT = [3, 1, 4, 15, 9, 26, 5, 3, 5, 8]
PLUGINS = Plugins(
    {
        "native": blade_native, "llama": blade_llama, "fcfs": blade_fcfs, "local": blade_local, "rtn": blade_rtn,
        "gptq": blade_gptq, "awq": blade_awq, "auto-round": blade_auto_round, "fp8": blade_fp8, "mlx": blade_mlx,
        "compressed-tensors": blade_compressed_tensors, "bitsandbytes": blade_bitsandbytes, "modelopt": blade_modelopt,
        "torchao": blade_torchao, "hqq": blade_hqq, "qwen": blade_qwen,
    }
)  # fmt: skip


RENAMED = {  # formats that differ from another one in names: what they are made from, the new names, the settings
    "fp8": (
        "ct-fp8-block",
        {"weight_scale": "weight_scale_inv"},
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]},
    ),
    "modelopt": (
        "ct-nvfp4",
        {"weight_packed": "weight", "weight_global_scale": "weight_scale_2"},
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"], "producer": {"name": "modelopt"}},
    ),
    "auto-round-awq": (
        "awq",
        {},
        {"quant_method": "auto-round", "bits": 4, "group_size": 32, "packing_format": "auto_round:auto_awq"},
    ),
}


def stored(case: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and the tensors of a fixture, or of one under other names."""
    source, names, settings = RENAMED.get(case, (case, {}, None))
    config = json.loads((FIXTURES / source / "config.json").read_text())
    if settings is not None:
        config["quantization_config"] = settings
    tensors = {}
    for name, tensor in load_file(FIXTURES / source / "model.safetensors").items():
        prefix, _, own = name.rpartition(".")
        inverse = own == "weight_global_scale" and case == "modelopt"
        tensors[f"{prefix}.{names.get(own, own)}"] = 1 / tensor if inverse else tensor
    return config, tensors


class QuantizedTorch(TorchOps):
    """The torch twin, told to compute on quantised weights in float32."""

    quantized_dtypes = (torch.float32,)


def settings_of(folder: Path) -> dict[str, Any]:
    """As the reader of the format gets them."""
    found = quantization_settings(json.loads((folder / "config.json").read_text()))
    assert isinstance(found, dict)
    return found


def make(settings: dict[str, Any]) -> GroupedQuantization:
    made = PLUGINS.registry("register_quantizations").create(settings["quant_method"], settings)
    assert isinstance(made, GroupedQuantization)
    return made


def dense(settings: dict[str, Any], weights: Any, prefix: str) -> Tensor:
    """[N, K] float32."""
    return dequantize(make(settings).weight(prefix, weights), torch.float32)


def opened(case: str) -> tuple[dict[str, Any], SafetensorsWeights]:
    return settings_of(FIXTURES / case), SafetensorsWeights(FIXTURES / case)


def assembled(folder: Path, quantize: str | None = None, ops: TorchOps | None = None) -> Assembly:
    """With torch's op set in place of this machine's."""
    ops = ops or QuantizedTorch()
    chosen = choose(Config(model=ModelOptions(model=str(folder), quantize=quantize, dtype="float32")), PLUGINS)
    form = choose_form(chosen.checkpoint, quantize, ops, torch.float32, PLUGINS)
    return replace(chosen, ops=ops, attention=PagedAttention(ops.device), form=form)


@torch.inference_mode()
def logits(assembly: Assembly) -> Tensor:
    """After the prompt's last token, [1, vocab_size]; what loading tells of memory is what was promised."""
    told: list[int] = []
    model = load_model(assembly, told.append)
    assert sum(told) == assembly.weight_bytes
    seq = Sequence(0, PROMPT, SamplingParams(max_tokens=1), blocks=[0])
    batch = build_batch(Step([seq], [len(PROMPT)]), 16, assembly.ops.to_device)
    return model.forward(batch, assembly.attention.allocate(assembly.kv_spec, 1))
