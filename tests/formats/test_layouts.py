"""Variants that the fixtures do not have: widths, groups, zeros, orders, scales."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from format_cases import dense, make
from tensors import fp8, gptq, pack, seeded

from blade import Float8Weight, GroupedWeight
from blade.nn import dequantize
from blade.nn.packing import unpack
from blade.testing import TensorWeights

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
CT = {"quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed"}


@pytest.mark.parametrize("bits", range(1, 9))
def test_integers_are_unpacked_across_words(bits: int) -> None:
    numbers = torch.randint(2**bits, (5, 96), generator=seeded(), dtype=torch.int64)
    assert unpack(pack(numbers, bits), bits, 96).long().equal(numbers)
    assert unpack(pack(numbers, bits), bits, 90).long().equal(numbers[:, :90])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("group", "kept"), [(32, 32), (64, 64), (-1, 128), (256, 128), (16, 16)])
def test_gptq_of_all_widths_and_groups(bits: int, group: int, kept: int) -> None:
    tensors, w = gptq(bits, group if 0 < group <= 128 else 128)
    settings = GPTQ | {"bits": bits, "group_size": group}
    weight = make(settings).weight("a", TensorWeights(tensors))
    assert isinstance(weight, GroupedWeight)
    assert (weight.bits, weight.group) == (max(4, bits), kept)
    assert dense(settings, TensorWeights(tensors), "a").equal(w)


def test_groups_that_end_within_a_row_become_smaller() -> None:
    tensors, w = gptq(4, 128, k=192)
    settings = GPTQ | {"group_size": 128}
    assert make(settings).weight("a", TensorWeights(tensors)).group == 64  # type: ignore[union-attr]
    assert dense(settings, TensorWeights(tensors), "a").equal(w)


@pytest.mark.parametrize(("group", "k", "kept"), [(8, 64, 8), (32, 72, 8), (-1, 72, 72), (128, 72, 72), (24, 96, 24)])
@pytest.mark.parametrize("bits", [4, 8])
def test_groups_that_no_kernel_computes_on_are_plain(group: int, k: int, kept: int, bits: int) -> None:
    tensors, w = gptq(bits, min(k, group) if group > 0 else k, k=k)
    settings, weights = GPTQ | {"bits": bits, "group_size": group}, TensorWeights(tensors)
    matrix = make(settings).matrix("a", weights)
    assert matrix is not None
    assert (matrix.shape, matrix.plain) == (tuple(w.shape), True)
    assert make(settings).weight("a", weights).group == kept  # type: ignore[union-attr]
    assert make(settings).numbers("a", weights, torch.float32).equal(w)


def test_rows_of_any_length_with_one_scale() -> None:
    q = torch.randint(-128, 128, (5, 70), generator=seeded(), dtype=torch.int8)
    scales = torch.rand(5, 1, generator=seeded()).half()
    weights = (
        {"quant_method": "compressed-tensors", "format": "int-quantized"},
        {"a.weight": q, "a.weight_scale": scales},
    )
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "int", "strategy": "channel"}}
    quantization = make(weights[0] | {"config_groups": {"group_0": group}})
    found = quantization.numbers("a", TensorWeights(weights[1]), torch.float32)
    assert found.equal(q.float() * scales.float())


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_both_versions_of_zeros(version: str) -> None:
    tensors, w = gptq(4, 32, less_one=int(version == "gptq"))
    assert dense(GPTQ | {"checkpoint_format": version}, TensorWeights(tensors), "a").equal(w)


@pytest.mark.parametrize(("version", "less_one"), [("gptq", 1), ("gptq", 0), ("gptq_v2", 0)])
def test_symmetric_weights_are_taken_by_the_zeros_that_are_there(version: str, less_one: int) -> None:
    tensors, w = gptq(4, 32, less_one=less_one, zero=8)
    settings = GPTQ | {"sym": True, "checkpoint_format": version}
    weight = make(settings).weight("a", TensorWeights(tensors))
    assert isinstance(weight, GroupedWeight)
    assert weight.zeros is None
    assert dense(settings, TensorWeights(tensors), "a").equal(w)


def test_an_act_order_is_kept_as_an_order() -> None:
    tensors, _ = gptq(4, 32)
    groups = torch.randperm(128, generator=seeded(3)) // 32  # of each feature
    tensors["a.g_idx"] = groups.int()
    q, zeros = unpack(tensors["a.qweight"].T, 4, 128).float(), unpack(tensors["a.qzeros"], 4, 64).T + 1
    weight = make(GPTQ).weight("a", TensorWeights(tensors))
    assert isinstance(weight, GroupedWeight)
    assert weight.order is not None
    assert groups[weight.order].equal(torch.arange(128) // 32)
    assert dense(GPTQ, TensorWeights(tensors), "a").equal(
        (q - zeros[:, groups]) * tensors["a.scales"].T.float()[:, groups]
    )
    tensors["a.g_idx"] = torch.arange(128).int() // 32
    assert make(GPTQ).weight("a", TensorWeights(tensors)).order is None  # type: ignore[union-attr]


def test_modules_may_have_settings_of_their_own() -> None:
    four, w4 = gptq(4, 32)
    eight, w8 = gptq(8, 64)
    tensors = TensorWeights(four | {name.replace("a.", "x.mlp.b."): tensor for name, tensor in eight.items()})
    own = {"+:.*mlp.*": {"bits": 8, "group_size": 64}, "-:.*attn.*": {}}
    assert dense(GPTQ | {"dynamic": own}, tensors, "a").equal(w4)
    assert dense(GPTQ | {"dynamic": own}, tensors, "x.mlp.b").equal(w8)
    rounded = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": False}
    rounded |= {"packing_format": "auto_round:auto_gptq", "extra_config": {r".*mlp\..": {"bits": 8, "group_size": 64}}}
    assert dense(rounded, tensors, "a").equal(w4)
    assert dense(rounded, tensors, "x.mlp.b").equal(w8)


@pytest.mark.parametrize("name", ["weight_scale_inv", "weight_scale"])
@pytest.mark.parametrize(
    ("block", "settings"), [((128, 128), {"weight_block_size": [128, 128]}), ((1, 200), {}), ((160, 200), {})]
)
def test_fp8_by_blocks_rows_and_matrices(name: str, block: tuple[int, int], settings: dict[str, Any]) -> None:
    q, scales, w = fp8(160, 200, block)
    tensors = TensorWeights({"a.weight": q, f"a.{name}": scales, "b.weight": w})
    weight = make(FP8 | settings).weight("a", tensors)
    assert isinstance(weight, Float8Weight)
    assert weight.block == block
    assert dense(FP8 | settings, tensors, "a").equal(w)
    assert make(FP8 | settings).matrix("b", tensors) is None
    if block == (160, 200):
        tensors.tensors[f"a.{name}"] = scales.view(())
        assert dense(FP8, tensors, "a").equal(w)


def test_scales_may_be_powers_of_two_by_their_exponents() -> None:
    q, scales, _ = fp8(128, 256, (128, 128))
    exponents = torch.tensor([[120, 127]], dtype=torch.uint8)
    tensors = TensorWeights({"a.weight": q, "a.weight_scale_inv": exponents.view(torch.float8_e8m0fnu)})
    settings = FP8 | {"weight_block_size": [128, 128], "scale_fmt": "ue8m0"}
    powers = torch.tensor([[2.0**-7, 1.0]]).repeat_interleave(128, 1)
    assert scales.shape == (1, 2)
    assert dense(settings, tensors, "a").equal(q.float() * powers)


def test_modelopt_has_a_second_scale() -> None:
    codes = torch.randint(256, (8, 32), generator=seeded(), dtype=torch.uint8)
    scales = torch.rand(8, 4, generator=seeded(1)).to(torch.float8_e4m3fn)
    q, whole, w = fp8(8, 64, (8, 64))
    tensors = TensorWeights(
        {
            "a.weight": codes,
            "a.weight_scale": scales,
            "a.weight_scale_2": torch.tensor(0.125),
            "b.weight": q,
            "b.weight_scale": whole.view(()),
            "c.weight": w,
        }
    )
    settings = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    fp4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    signed = torch.cat([fp4, -fp4])[torch.stack([codes & 15, codes >> 4], dim=2).flatten(1).long()]
    assert dense(settings, tensors, "a").equal(signed * scales.float().repeat_interleave(16, 1) * 0.125)
    assert dense(settings, tensors, "b").equal(w)
    assert make(settings).matrix("c", tensors) is None


def test_mlx_modules_may_have_settings_of_their_own() -> None:
    settings = {"quant_method": "mlx", "model_type": "llama", "bits": 4, "group_size": 64, "lm_head": {"bits": 6}}
    settings |= {"model.layers.0.mlp.up_proj": False}  # plain, as its tensors say
    for prefix, bits in (("a", 4), ("lm_head", 6)):
        q = torch.randint(2**bits, (8, 128), generator=seeded())
        scales, biases = torch.randn(2, 8, 2, generator=seeded(1)).bfloat16()
        tensors = {f"{prefix}.weight": pack(q, bits).view(torch.uint32), f"{prefix}.scales": scales}
        w = q * scales.float().repeat_interleave(64, 1) + biases.float().repeat_interleave(64, 1)
        assert dense(settings, TensorWeights(tensors | {f"{prefix}.biases": biases}), prefix).allclose(w)


def test_compressed_integers_with_an_order_and_old_zeros() -> None:
    """`weight_g_idx`, which llm-compressor wrote until 2026, and zeros that are not packed."""
    q = torch.randint(16, (8, 64), generator=seeded())
    groups = torch.randperm(64, generator=seeded(1)) // 32
    scales = torch.rand(8, 2, generator=seeded(2)).bfloat16()
    zeros = torch.randint(-8, 8, (8, 2), generator=seeded(3), dtype=torch.int8)
    tensors = TensorWeights(
        {
            "a.weight_packed": pack(q, 4),
            "a.weight_shape": torch.tensor([8, 64]),
            "a.weight_scale": scales,
            "a.weight_zero_point": zeros,
            "a.weight_g_idx": groups.int(),
        }
    )
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": False,
        "strategy": "group",
        "group_size": 32,
        "actorder": "group",
    }
    settings = CT | {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}
    assert dense(settings, tensors, "a").equal((q - 8 - zeros[:, groups]) * scales.float()[:, groups])


def test_a_block_may_be_written_as_a_text() -> None:
    q, scales, w = fp8(160, 200, (128, 64))
    weights = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": "128x64"}
    group = {"targets": ["Linear"], "weights": weights}
    settings = CT | {"format": "float-quantized", "config_groups": {"group_0": group}}
    assert dense(settings, TensorWeights({"a.weight": q, "a.weight_scale": scales}), "a").equal(w)


def test_a_group_is_found_by_name_pattern_or_class() -> None:
    from blade.nn import Keys
    from blade_compressed_tensors.schemes import Schemes

    def group(bits: int, *targets: str) -> dict[str, Any]:
        return {"targets": list(targets), "weights": {"num_bits": bits, "strategy": "group", "group_size": 32}}

    groups = {"a": group(4, "Linear"), "b": group(8, "re:.*down_proj"), "c": group(5, "model.x.down_proj", "other")}
    settings = CT | {"config_groups": groups}
    schemes = Schemes(Keys(settings), settings)
    names = ("model.x.up_proj", "model.y.down_proj", "model.x.down_proj")
    assert [schemes.of(name).bits for name in names] == [4, 8, 5]


def test_torchao_integers_are_as_wide_as_the_settings_of_their_module_say() -> None:
    def config(dtype: str) -> dict[str, Any]:
        return {"_type": "IntxWeightOnlyConfig", "_data": {"weight_dtype": {"_type": "torch.dtype", "_data": dtype}}}

    configs = {"x.b.weight": config("int5"), "re:x\\..": config("int3"), "re:y": None, "_default": config("int8")}
    settings = {"quant_type": {"default": {"_type": "FqnToConfig", "_data": {"fqn_to_config": configs}}}}
    settings["quant_method"] = "torchao"  # type: ignore[assignment]
    for prefix, bits in (("x.a", 4), ("x.b", 5), ("x.bc", 8), ("y", 8)):
        q = torch.randint(-4, 4, (8, 64), generator=seeded(), dtype=torch.int8)
        zeros = torch.randint(-4, 4, (8, 2), generator=seeded(1), dtype=torch.int8)
        scales = torch.rand(8, 2, generator=seeded(2)).bfloat16()
        tensors = TensorWeights(
            {f"{prefix}._weight_qdata": q, f"{prefix}._weight_scale": scales, f"{prefix}._weight_zero_point": zeros}
        )
        weight = make(settings).weight(prefix, tensors)
        assert isinstance(weight, GroupedWeight)
        assert weight.bits == bits
        w = (q - zeros.repeat_interleave(32, 1)) * scales.float().repeat_interleave(32, 1)
        assert dense(settings, tensors, prefix).equal(w)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (160, 1), (2, 4)])
def test_torchao_floats_by_blocks_rows_and_matrices(shape: tuple[int, ...]) -> None:
    block = (160, 256) if len(shape) < 2 else (160 // shape[0], 256 // shape[1])
    q, scales, w = fp8(160, 256, block)
    tensors = TensorWeights({"a._weight_qdata": q, "a._weight_scale": scales.view(shape)})
    settings = {"quant_method": "torchao", "quant_type": {"default": {"_type": "Float8WeightOnlyConfig", "_data": {}}}}
    assert dense(settings, tensors, "a").equal(w)


def test_torchao_integers_without_zero_points() -> None:
    """Packed ones that are rounded for activations in 8-bit floats have zeros that are all 0."""
    q = torch.randint(16, (8, 64), generator=seeded())
    scales = torch.rand(2, 8, generator=seeded(1)).bfloat16()
    tensors = {"a._weight_qdata": pack(q ^ 8, 4).view(torch.int8), "a._weight_scale": scales}
    settings = {"quant_method": "torchao", "quant_type": "int4_weight_only"}
    weight = make(settings).weight("a", TensorWeights(tensors | {"a._weight_zero_point": torch.zeros(2, 8)}))
    assert isinstance(weight, GroupedWeight)
    assert weight.minima is None
    assert dequantize(weight, torch.float32).equal((q - 8) * scales.T.float().repeat_interleave(32, 1))
