"""What a format's reader refuses by name, and what it only says."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any

import pytest
import torch
from format_cases import FIXTURES as F
from format_cases import PLUGINS, assembled, make, settings_of, stored
from safetensors.torch import save_file
from tensors import gptq, pack

from blade import CheckpointError, ConfigError
from blade.assembly import load_model
from blade.testing import TensorWeights

if TYPE_CHECKING:
    from pathlib import Path

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32}
ROUND = {"quant_method": "auto-round", "bits": 4, "group_size": 32}
FP8 = {"quant_method": "fp8"}
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True}
OPT = {"quant_method": "modelopt", "quant_algo": "FP8"}
MLX = {"quant_method": "mlx", "model_type": "qwen3", "bits": 4, "group_size": 64, "mode": "affine"}
CT = settings_of(F / "ct-w4a16")


def torchao(kind: str, **fields: Any) -> dict[str, Any]:
    return {"quant_method": "torchao", "quant_type": {"default": {"_type": kind, "_data": fields}}}


AO = torchao("Int8WeightOnlyConfig")


def with_weights(**settings: Any) -> dict[str, Any]:
    group = CT["config_groups"]["group_0"]
    return CT | {"config_groups": {"group_0": group | {"weights": group["weights"] | settings}}}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (GPTQ | {"bits": 5}, "quantization_config.bits must be one of 2, 3, 4, 8, not 5"),
        (GPTQ | {"bits": "4"}, "quantization_config.bits must be an integer"),
        (GPTQ | {"group_size": 0}, "quantization_config.group_size must be a positive integer, or -1 for whole rows"),
        (
            GPTQ | {"checkpoint_format": "marlin"},
            "quantization_config.checkpoint_format is 'marlin', which blade does not",
        ),
        (GPTQ | {"adapter": {"path": "x"}}, "quantization_config.adapter is {'path': 'x'}, which blade does not serve"),
        (GPTQ | {"dynamic": {"+:(": {"bits": 8}}}, "quantization_config.dynamic: '(' is no regular expression"),
        (GPTQ | {"dynamic": {"+:x": {"bits": 9}}}, "quantization_config.dynamic.+:x.bits must be one of"),
        (AWQ | {"version": "gemv"}, "quantization_config.version is 'gemv', which blade does not serve"),
        (AWQ | {"bits": 8}, "quantization_config.bits is 8, which blade does not serve"),
        (ROUND | {"packing_format": "mlx"}, "quantization_config.packing_format is 'mlx'"),
        (ROUND | {"data_type": "mx_fp"}, "quantization_config.data_type is 'mx_fp'"),
        (ROUND | {"rotation_config": {"x": 1}}, "quantization_config.rotation_config is {'x': 1}"),
        (CT | {"transform_config": {"x": 1}}, "quantization_config.transform_config is {'x': 1}"),
        (CT | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "quantization_config.sparsity_config.format"),
        (
            CT | {"config_groups": {"W4A16": ["Linear"]}},
            "quantization_config.config_groups must be an object of objects",
        ),
        (CT | {"config_groups": {}}, "quantises no weights"),
        (with_weights(num_bits=9), "config_groups.group_0.weights.num_bits must be what pack-quantized can be, not 9"),
        (with_weights(dynamic=True), "config_groups.group_0.weights.dynamic is True, which blade does not serve"),
        (with_weights(type="float"), 'config_groups.group_0.weights.type must be "int" for pack-quantized'),
        (FP8 | {"fmt": "e5m2"}, "quantization_config.fmt is 'e5m2'"),
        (FP8 | {"weight_block_size": [128]}, "quantization_config.weight_block_size must be two integers"),
        (BNB | {"bnb_4bit_quant_storage": "bfloat16"}, "quantization_config.bnb_4bit_quant_storage is 'bfloat16'"),
        (MLX | {"mode": "mxfp4"}, "quantization_config.mode is 'mxfp4'"),
        (MLX | {"model_type": "qwen3_next"}, "quantization_config.model_type is 'qwen3_next'"),
        (MLX | {"lm_head": {"bits": 7}}, "quantization_config.lm_head.bits must be one of 2, 3, 4, 5, 6, 8, not 7"),
        (OPT | {"quant_algo": "W4A8_AWQ"}, "quantization_config.quant_algo is 'W4A8_AWQ'"),
        (torchao("GemliteUIntXWeightOnlyConfig"), "quant_type.default is 'GemliteUIntXWeightOnlyConfig', which blade"),
        (
            torchao("Int4WeightOnlyConfig", int4_packing_format={"_type": "x", "_data": "TILE_PACKED_TO_4D"}),
            "quant_type.default.int4_packing_format is 'TILE_PACKED_TO_4D', which blade does not serve",
        ),
        (
            torchao("Float8WeightOnlyConfig", weight_dtype={"_type": "torch.dtype", "_data": "float8_e5m2"}),
            "quant_type.default.weight_dtype is 'float8_e5m2'",
        ),
        (
            torchao("FqnToConfig", fqn_to_config={"re:(": {"_type": "Int8WeightOnlyConfig", "_data": {}}}),
            "quant_type.default.re:(: '(' is no regular expression",
        ),
        (AO | {"quant_type": {"default": 3}}, "quantization_config.quant_type.default is 3, which blade does not"),
    ],
)
def test_what_would_change_the_weights_is_refused_by_name(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        make(settings)
    assert str(caught.value).startswith("config.json: ")
    assert words in str(caught.value)


def test_what_is_not_known_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "blade.formats"):
        make(GPTQ | {"damp_percent": 0.1, "novelty": 3})
        make(CT | {"kv_cache_scheme": {"num_bits": 8}})
    assert [record.getMessage() for record in caplog.records] == [
        "config.json: quantization_config.novelty is not known to blade, which goes on without it",
        "config.json: kv_cache_scheme is not used: see --kv-cache-quant",
    ]


def weight_of(settings: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    quantization, weights = make(settings), TensorWeights(tensors)
    quantization.find("a", weights)
    quantization.weight("a", weights)


HQQ = {"quant_method": "hqq"}
QUARTERS = {
    "a.W_q": torch.zeros(8, 16, dtype=torch.uint8), "a.scale": torch.ones(16, 1), "a.zero": torch.ones(16, 1),
    "a.shape": torch.tensor([8, 32]), "a.nbits": torch.tensor(4),
}  # fmt: skip
FP8_WEIGHT = torch.zeros(8, 32).to(torch.float8_e4m3fn)
BYTES = torch.full((8, 32), 9, dtype=torch.int8)
PLAIN_INT8 = {"a._weight_qdata": BYTES, "a._weight_scale": torch.ones(8, 1)}
INT4 = {"a.weight_packed": pack(torch.zeros(8, 64).long(), 4), "a.weight_scale": torch.ones(8, 2)}


@pytest.mark.parametrize(
    ("settings", "tensors", "words"),
    [
        (GPTQ, {"a.scales": None}, "no tensor a.scales, without which"),
        (GPTQ, {"a.scales": torch.ones(4, 8)}, "Tensor a.scales has shape (4, 8); to those beside it belongs (4, 64)."),
        (GPTQ, {"a.scales": torch.full((4, 64), torch.nan)}, "Tensor a.scales holds infinity or NaN."),
        (GPTQ, {"a.qzeros": torch.ones(4, 8)}, "Tensor a.qzeros is of float32, not int32."),
        (GPTQ, {"a.g_idx": torch.zeros(128).int()}, "Tensor a.g_idx does not put 32 features into each of 4 groups."),
        (GPTQ, {"a.qweight": torch.zeros(3, 3, 3).int()}, "Tensor a.qweight has shape (3, 3, 3), which is no matrix."),
        (GPTQ | {"bits": 3}, {}, "Tensor a.qweight has 16 rows, which cannot hold whole numbers of 3 bits."),
        (AWQ, {}, "Tensor a.qzeros has shape (4, 8); to those beside it belongs (1, 64)."),
        (FP8, {"a.weight": FP8_WEIGHT}, "no tensor a.weight_scale_inv, without which a.weight means nothing."),
        (
            FP8,
            {"a.weight": FP8_WEIGHT, "a.weight_scale_inv": torch.ones(3)},
            "Tensor a.weight_scale_inv has shape (3,); to a.weight belongs (8, 1).",
        ),
        (OPT, {"a.weight": FP8_WEIGHT}, "no tensor a.weight_scale, without which a.weight means nothing."),
        (CT, {"a.weight": FP8_WEIGHT}, "no tensor a.weight_scale, without which a.weight means nothing."),
        (CT, {"a.weight": FP8_WEIGHT, "a.weight_scale": torch.ones(8, 1)}, "is none of the format pack-quantized"),
        (CT, INT4, "no tensor a.weight_shape, without which"),
        (CT, INT4 | {"a.weight_shape": torch.tensor([8, 128])}, "Tensor a.weight_shape says (8, 128)"),
        (MLX, {"a.scales": torch.ones(8, 1)}, "Tensor a.weight is of float32, not uint32 or int32."),
        (BNB, {"a.weight": FP8_WEIGHT}, "has neither a.weight.absmax nor a.SCB, without which a.weight means nothing."),
        (AO, {"a._weight_qdata": BYTES}, "no tensor a._weight_scale, without which a._weight_qdata means nothing."),
        (AO, PLAIN_INT8 | {"a._weight_scale": torch.ones(3, 1)}, "has shape (3, 1), which is none for 8 rows of 32."),
        (AO, PLAIN_INT8 | {"a._weight_zero_point": BYTES}, "has shape (8, 32); to those beside it belongs (8, 1)."),
        (AO, PLAIN_INT8 | {"a._weight_act_pre_scale": torch.ones(32)}, "a._weight_act_pre_scale is not served: the"),
        (HQQ, QUARTERS | {"a.axis": torch.tensor(2)}, "Tensor a.axis is 2, neither 0 nor 1."),
        (
            HQQ,
            QUARTERS | {"a.axis": torch.tensor(0)},
            "a.scale has shape (16, 1); to those beside it belongs (1, 16).",
        ),
        (HQQ, QUARTERS | {"a.nbits": torch.tensor(5)}, "Tensor a.nbits is 5; served are 1, 2, 3, 4, 8."),
        (HQQ, QUARTERS | {"a.nbits": torch.tensor(3)}, "a.W_q has shape (8, 16), which is none for (8, 32) of 3"),
        (HQQ, QUARTERS | {"a.quant_zero": torch.tensor(1)}, "a.quant_zero is 1: zeros that are quantised are not"),
        (HQQ, QUARTERS | {"a.shape": torch.tensor([8, 64])}, "a.W_q has shape (8, 16), which is none for (8, 64) of 4"),
        (
            HQQ,
            QUARTERS | {"a.scale": torch.ones(8, 1)},
            "a.scale has shape (8, 1); to those beside it belongs (16, 1).",
        ),
        (HQQ, QUARTERS | {"a.shape": None}, "The checkpoint has no tensor a.shape"),
        (HQQ, QUARTERS | {"a.zero": torch.full((16, 1), 1e6)}, "a.zero and a.scale make numbers beyond float16."),
        (torchao("IntxWeightOnlyConfig", weight_dtype="int4"), PLAIN_INT8, "holds numbers that 4 bits cannot."),
        (BNB, {"a.weight.absmax": torch.ones(1)}, "no tensor a.weight.quant_state.bitsandbytes__nf4"),
    ],
)
def test_a_malformed_tensor_is_named(settings: dict[str, Any], tensors: dict[str, Any], words: str) -> None:
    own = {**gptq(4, 32)[0], "a.weight": torch.ones(8, 32), **tensors}
    with pytest.raises(CheckpointError) as caught:
        weight_of(settings, {name: tensor for name, tensor in own.items() if tensor is not None})
    assert words in str(caught.value)


def test_a_quantised_tensor_is_not_taken_for_plain_numbers() -> None:
    from blade.checkpoint.safetensors import SafetensorsWeights

    weights = SafetensorsWeights(F / "ct-fp8")
    with pytest.raises(CheckpointError, match=r"q_proj\.weight' is of F8_E4M3, which is no plain number"):
        weights.get("model.layers.0.self_attn.q_proj.weight", torch.float32)


def test_quantised_tensors_without_a_word_of_them_in_config_json(tmp_path: Path) -> None:
    config, tensors = stored("gptq")
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no tensor .*q_proj\.weight. It has .*config.json needs its quanti"):
        load_model(assembled(tmp_path))


def test_what_is_quantised_is_not_quantised_again() -> None:
    with pytest.raises(ConfigError, match=r"by 'gptq' already, so --quantize int8 .* ask for none, or use the model's"):
        assembled(F / "gptq", "int8")


def test_every_method_has_its_entry_point() -> None:
    import tomllib
    from pathlib import Path

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    modules = set(project["project"]["entry-points"]["blade"].values())
    registry = PLUGINS.registry("register_quantizations")
    assert {registry.entry(name).factory.__module__ for name in registry} <= modules
    assert {f"plugins/{name}" for name in modules if name.startswith("blade_") and name != "blade_native"} <= set(
        project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    )
