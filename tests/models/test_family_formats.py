"""Every family in every weight format that can hold it computes what it does with the numbers that are stored."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import pytest
import torch
from checkpoints import Reference, make_reference
from quantised import FORMATS, quantised
from stepper import ARCHITECTURES, Stepper, one_by_one
from test_qwen1 import CONFIG as QWEN1
from test_qwen1 import make_tensors

import blade_auto_round
import blade_awq
import blade_bitsandbytes
import blade_compressed_tensors
import blade_fp8
import blade_gptq
import blade_hqq
import blade_mlx
import blade_modelopt
import blade_rtn
import blade_torchao
from blade.nn import GroupedQuantization, dequantize
from blade.nn.tensors import loaded_bytes
from blade.plugins import Plugins
from blade.testing import TensorWeights
from blade_native import cpu_ops
from blade_native.reference import TorchOps
from blade_rtn.rtn import Int4

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from blade.contracts import Ops

FAMILIES = [
    "llama grouped untied", "llama4", "qwen1", "qwen2 tied", "qwen2 moe", "qwen3", "qwen3 moe", "qwen3 next",
    "qwen3.5", "qwen3.5 vision", "qwen3.5 moe", "qwen4 exp ngrams",
]  # fmt: skip
SOME = {  # families of the formats that are not for all, or read as others are
    "mlx": {"llama grouped untied", "qwen2 tied", "qwen3"},  # whose tensors MLX leaves as they are
    "ct-mxfp8": {"llama4", "qwen2 moe", "qwen3", "qwen3 next"},
    "fbgemm-fp8": {"qwen1", "qwen3 moe", "qwen3.5"},
}
PLUGINS = Plugins(
    {
        "gptq": blade_gptq, "awq": blade_awq, "auto-round": blade_auto_round, "fp8": blade_fp8, "mlx": blade_mlx,
        "compressed-tensors": blade_compressed_tensors, "bitsandbytes": blade_bitsandbytes, "rtn": blade_rtn,
        "modelopt": blade_modelopt, "torchao": blade_torchao, "hqq": blade_hqq,
    }
)  # fmt: skip
PROMPT = [3, 1, 4, 15, 9, 26, 5, 35]
WITH_KERNELS = {"ct-int4", "ct-w8a8", "fp8", "int4"}  # whose activations are rounded too
IN_HALF = {"bnb-nf4"}  # whose scales lose something in float16
PAIRS = [
    (family, kind) for family in FAMILIES for kind in (*FORMATS, "int8", "int4") if family in SOME.get(kind, FAMILIES)
]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """More only wait for each other, in models of this size."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class QuantizedTorch(TorchOps):
    """Without kernels that round activations."""

    quantized_dtypes = (torch.float32,)


@cache
def source(family: str) -> Reference:
    """With the tensors that its model asks for, experts one by one."""
    if family == "qwen1":
        return Reference(QWEN1, TensorWeights(make_tensors()), [], [])
    found = make_reference(family)
    architecture = ARCHITECTURES.create(found.config["architectures"][0])
    seen = getattr(architecture, "weights", lambda config, weights: weights)(found.config, found.weights)
    return Reference(found.config, TensorWeights({name: seen.get(name) for name in seen.names()}), [], [])


def logits(family: str, tensors: dict[str, Tensor], quantization: GroupedQuantization | None, ops: Ops) -> Tensor:
    config = source(family).config
    stepper = Stepper(Reference(config, TensorWeights(tensors), [PROMPT], []), ops=ops, quantization=quantization)
    return stepper.run(one_by_one([len(PROMPT)], len(PROMPT)))[0]


def prepared(family: str, kind: str) -> tuple[dict[str, Tensor], dict[str, Tensor], GroupedQuantization, set[str]]:
    """A checkpoint, the plain one that it stands for, its reader, and what is quantised in it."""
    plain, registry = dict(source(family).weights.tensors), PLUGINS.registry("register_quantizations")
    if kind in FORMATS:
        config, written = source(family).config, FORMATS[kind]
        settings = written.settings | ({"model_type": config["model_type"]} if kind == "mlx" else {})
        made, prefixes = quantised(plain, written.write)
        return made, plain, registry.create(settings["quant_method"], settings), prefixes
    quantization, made = registry.create(kind, {}), dict(plain)
    weights = TensorWeights(made)
    found = {name.removesuffix(".weight") for name in made if name.endswith(".weight")}
    prefixes = {prefix for prefix in found if quantization.find(prefix, weights)[1]}
    for prefix in prefixes:
        plain[f"{prefix}.weight"] = dequantize(quantization.weight(prefix, weights), torch.float32)
    return made, plain, quantization, prefixes


@pytest.mark.parametrize(("family", "kind"), PAIRS)
def test_it_computes_what_is_stored(family: str, kind: str) -> None:
    made, plain, quantization, prefixes = prepared(family, kind)
    weights, ops = TensorWeights(made), QuantizedTorch()
    assert len(prefixes) >= 8
    assert all(quantization.find(prefix, weights)[1] for prefix in prefixes)
    exact = logits(family, plain, None, ops)
    found = logits(family, made, quantization, ops)
    assert float((found - exact).norm() / exact.norm()) < (2e-3 if kind in IN_HALF else 2e-5)
    if kind in WITH_KERNELS:
        rounded, own = logits(family, made, quantization, cpu_ops(1)), exact
        if isinstance(quantization, Int4):  # which each op set rounds to as suits its kernels
            tensors = {
                f"{prefix}.weight": dequantize(quantization.rounded(prefix, weights, cpu_ops(1)), torch.float32)
                for prefix in prefixes
            }
            own = logits(family, plain | tensors, None, ops)
        errors = (rounded - own).norm(dim=1) / own.norm(dim=1)
        assert float(errors.median()) < 0.1  # few tokens change their experts
    smaller = sum(loaded_bytes(name, weights, ops, torch.float32, quantization) for name in made)
    assert smaller < 0.75 * sum(tensor.nbytes for tensor in plain.values())


SEEING = {  # what tools write of modules that stay plain, the other half's among them
    ("qwen2.5 vl yarn vision", "awq"): {"modules_to_not_convert": ["visual"]},
    ("qwen3 vl vision", "fp8"): {"modules_to_not_convert": ["lm_head", "model.visual.blocks.0.attn.qkv"]},
    ("qwen3 vl moe vision", "ct-int4"): {"ignore": ["lm_head", "re:.*visual.*", "re:.*mlp.gate$"]},
    ("llama vision", "ct-fp8"): {"ignore": ["re:.*lm_head", "re:multi_modal_projector.*", "re:vision_model.*"]},
}


@pytest.mark.parametrize(("family", "kind"), SEEING)
def test_what_sees_stays_plain_and_is_not_read(family: str, kind: str) -> None:
    stored, plain, written = make_reference(family).weights.tensors, dict(source(family).weights.tensors), FORMATS[kind]
    unread = {name: tensor for name, tensor in stored.items() if name not in plain and ".experts." not in name}
    assert any("vision" in name or "visual" in name for name in unread)
    made, prefixes = quantised(plain, written.write)
    settings = written.settings | SEEING[family, kind]
    quantization = PLUGINS.registry("register_quantizations").create(settings["quant_method"], settings)
    assert len(prefixes) >= 8
    exact = logits(family, plain | unread, None, QuantizedTorch())
    found = logits(family, made | unread, quantization, QuantizedTorch())
    assert float((found - exact).norm() / exact.norm()) < 2e-5


@pytest.mark.parametrize(
    ("family", "tables"), [("qwen1", {"transformer.wte", "lm_head"}), ("qwen3", {"model.embed_tokens"})]
)
def test_int4_keeps_the_tables_in_6_bits(family: str, tables: set[str]) -> None:
    made, _, quantization, prefixes = prepared(family, "int4")
    weights = TensorWeights(made)
    bits = {prefix: quantization.weight(prefix, weights).bits for prefix in prefixes}
    assert {prefix for prefix, width in bits.items() if width == 6} >= tables
    assert {width for prefix, width in bits.items() if ".layers." in prefix or ".h." in prefix} == {4}
