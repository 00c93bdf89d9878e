"""Makes the checkpoints in fixtures/ with the tools that people make theirs with, and notes what they stand for.

    pip install llmcompressor==0.14.0.1 bitsandbytes==0.50.2 'mlx[cpu]==0.32.4'   # in an environment of their own
    pip install --no-deps mlx-lm==0.32.2 sentencepiece torchao==0.18.0 hqq==0.2.8.post1
    python tests/formats/make_fixtures.py

Of each quantised matrix the tool's own dequantisation is kept as its product with fixed numbers, and of each model the
logits after a prompt, computed by transformers on the dequantised weights in float32.
"""

from __future__ import annotations

import json
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

FIXTURES = Path(__file__).parent / "fixtures"
SCRATCH = Path("/tmp/blade-fixtures")
PROMPT = [3, 1, 4, 15, 9, 26, 5, 3, 5, 8]
MODULES = [
    *(f"model.layers.0.self_attn.{name}_proj" for name in "qkvo"),
    *(f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")),
]
Dense = dict[str, "Tensor"]  # by module: the tool's own dequantisation


def make_model() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=32,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()
    for name, parameter in model.named_parameters():
        parameter.data.normal_(mean=float("norm" in name), std=0.2)
    return model


def make_tokenizer() -> Any:
    """One that the tools ask for and do not use."""
    from tokenizers import Tokenizer, models

    return transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a")))


def plain_folder() -> Path:
    folder = SCRATCH / "plain"
    if not folder.exists():
        make_model().save_pretrained(folder)
    return folder


# compressed-tensors, by llm-compressor


def integers(bits: int, **settings: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32} | settings


def floats(bits: int, **settings: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": "float", "symmetric": True} | settings


def compressed(*groups: tuple[list[str], dict[str, Any]], ignore: tuple[str, ...] = ()) -> Callable[[Path], Dense]:
    def make(folder: Path) -> Dense:
        from llmcompressor import oneshot
        from llmcompressor.modifiers.quantization import QuantizationModifier

        schemes = {
            f"group_{i}": {"targets": targets, "weights": weights, "input_activations": None}
            for i, (targets, weights) in enumerate(groups)
        }
        if len(groups) == 1 and groups[0][1].get("strategy") == "channel":  # W8A8, in integers or floats
            kind = {"num_bits": 8, "type": groups[0][1]["type"], "symmetric": True}
            schemes["group_0"]["input_activations"] = kind | {"strategy": "token", "dynamic": True}
        recipe = QuantizationModifier(config_groups=schemes, ignore=["lm_head", *ignore])
        model = transformers.LlamaForCausalLM.from_pretrained(plain_folder(), dtype=torch.bfloat16)
        oneshot(model=model, recipe=recipe, tokenizer=make_tokenizer())
        model.save_pretrained(folder, save_compressed=True)
        return decompress(folder)

    return make


def decompress(folder: Path) -> Dense:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.nvfp4 import base
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils.match import match_name

    base.unpack_fp4_from_uint8 = partial(unpack_fp4_from_uint8, dtype=torch.float32)  # bfloat16, if left alone
    config = QuantizationConfig(**quantization(folder))
    tensors = load_file(folder / "model.safetensors")
    dense = {}
    for module in MODULES:
        own = {name.removeprefix(f"{module}."): t for name, t in tensors.items() if name.startswith(f"{module}.")}
        if "weight_scale" not in own:
            continue
        schemes = config.config_groups.values()
        scheme = next(s for s in schemes if any(t == "Linear" or match_name(module, t) for t in s.targets))
        kind = scheme.format or config.format
        if own["weight_scale"].dtype == torch.bfloat16:
            own["weight_scale"] = own["weight_scale"].float()
        compressor = BaseCompressor.get_value_from_registry(kind)
        dense[module] = compressor.decompress(own, scheme)["weight"].float()
    return dense


def quantization(folder: Path) -> dict[str, Any]:
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    keys = ("config_groups", "format", "ignore", "kv_cache_scheme", "quantization_status")
    return {key: settings[key] for key in keys if key in settings}


# GPTQ's and AWQ's layouts, by auto-round


def auto_round(kind: str, bits: int, sym: bool) -> Callable[[Path], Dense]:
    def make(folder: Path) -> Dense:
        from auto_round import AutoRound

        rounding = AutoRound(
            make_model(), make_tokenizer(), bits=bits, group_size=32, sym=sym, iters=0, disable_opt_rtn=True
        )
        rounding.quantize_and_save(str(folder), format=kind)
        (found,) = folder.glob("**/*.safetensors")
        if found.parent != folder:  # in a folder named after the scheme
            shutil.copytree(found.parent, folder, dirs_exist_ok=True)
            shutil.rmtree(found.parent)
        return dense_of_words(folder)

    return make


def dense_of_words(folder: Path) -> Dense:
    """By auto-round's own torch linears, on the identity."""
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    tensors = load_file(folder / "model.safetensors")
    return {
        module: linear_of_words(settings, {n.rpartition(".")[2]: t for n, t in tensors.items() if n.startswith(module)})
        for module in MODULES
    }


def linear_of_words(settings: dict[str, Any], tensors: dict[str, Tensor]) -> Tensor:
    from auto_round.export.export_to_awq.utils import dequantize_gemm
    from auto_round_extension.torch import qlinear_torch, qlinear_torch_zp

    bits, group = settings["bits"], settings["group_size"]
    kind = settings.get("packing_format", settings["quant_method"])
    if "awq" in kind:
        scales = tensors["scales"].float()
        return dequantize_gemm(tensors["qweight"], tensors["qzeros"], scales, bits, group).float().T.contiguous()
    plus_one = "gptq" in kind and settings.get("checkpoint_format") != "gptq_v2"
    module = qlinear_torch_zp if plus_one else qlinear_torch
    n, k = tensors["qweight"].shape[1], tensors["qweight"].shape[0] * 32 // bits
    parts = []
    for start in range(0, n, 32):  # with g_idx it knows no more outputs than inputs
        linear = module.QuantLinear(bits, group, k, 32, bias=False, g_idx="g_idx" in tensors)
        linear.qweight = tensors["qweight"][:, start : start + 32]
        linear.qzeros = tensors["qzeros"][:, start * bits // 32 : (start + 32) * bits // 32]
        linear.scales = tensors["scales"][:, start : start + 32].float()
        if "g_idx" in tensors:
            linear.g_idx = tensors["g_idx"]
        parts.append(linear(torch.eye(k)))
    return torch.cat(parts, dim=1).T.contiguous()


def act_order(version: str, bits: int) -> Callable[[Path], Dense]:
    """GPTQ with desc_act: packed by auto-round's linears, of features in a random order."""

    def make(folder: Path) -> Dense:
        from auto_round_extension.torch import qlinear_torch, qlinear_torch_zp

        model = make_model()
        model.save_pretrained(folder)
        settings = {
            "quant_method": "gptq", "bits": bits, "group_size": 32, "desc_act": True, "sym": False,
            "checkpoint_format": version, "damp_percent": 0.1, "true_sequential": True,
        }  # fmt: skip
        tensors, dense = dict(load_file(folder / "model.safetensors")), {}
        for module in MODULES:
            weight = tensors.pop(f"{module}.weight").float()
            n, k = weight.shape
            order = torch.randperm(k)
            groups = weight[:, order].view(n, -1, 32)
            low, high = groups.amin(2), groups.amax(2)
            scales = ((high - low) / (2**bits - 1)).half().float()
            zeros = (-low / scales).round().clamp(1, 2**bits - 1)
            kind = qlinear_torch if version == "gptq_v2" else qlinear_torch_zp
            linear = kind.QuantLinear(bits, 32, k, n, bias=False, g_idx=True)
            q = (groups / scales[..., None] + zeros[..., None]).round().clamp(0, 2**bits - 1)
            exact = ((q - zeros[..., None]) * scales[..., None]).view(n, k)
            original = torch.empty_like(exact).index_copy_(1, order, exact)
            # its packer knows no order: pack integers as they are to lie, by scales of 1
            whole = torch.empty_like(exact).index_copy_(1, order, q.view(n, k))
            source = torch.nn.Linear(k, n, bias=False)
            source.weight.data = whole - zeros[:, :1]
            linear.pack(source, torch.ones_like(scales), zeros[:, :1].expand_as(zeros).clone())
            words = linear.qweight
            linear.pack(torch.nn.Linear(k, n, bias=False), scales, zeros.clone())
            own = {
                "qweight": words,
                "qzeros": linear.qzeros,
                "scales": scales.T.half().contiguous(),
                "g_idx": torch.empty(k, dtype=torch.int32).index_copy_(0, order, torch.arange(k).int() // 32),
            }
            tensors |= {f"{module}.{name}": tensor.contiguous() for name, tensor in own.items()}
            dense[module] = linear_of_words(settings, own)
            assert torch.allclose(dense[module], original, atol=1e-5)
        save_file(tensors, folder / "model.safetensors")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
        return dense

    return make


# bitsandbytes, by transformers


def bitsandbytes(**settings: Any) -> Callable[[Path], Dense]:
    def make(folder: Path) -> Dense:
        from bitsandbytes import functional
        from bitsandbytes.nn import Linear4bit

        config = transformers.BitsAndBytesConfig(**settings)
        model = transformers.LlamaForCausalLM.from_pretrained(
            plain_folder(), quantization_config=config, dtype=torch.bfloat16, device_map="cpu"
        )
        model.save_pretrained(folder)
        dense = {}
        for module in MODULES:
            weight = model.get_submodule(module).weight
            if isinstance(model.get_submodule(module), Linear4bit):
                weight.quant_state.dtype = torch.float32
                dense[module] = functional.dequantize_4bit(weight.data, weight.quant_state).float()
            else:
                dense[module] = weight.CB.float() * (weight.SCB.float() / 127)[:, None]
        return dense

    return make


# MLX, by mlx-lm


def mlx(bits: int) -> Callable[[Path], Dense]:
    def make(folder: Path) -> Dense:
        import mlx.core as mx
        from mlx_lm import convert

        make_tokenizer().save_pretrained(plain_folder())
        convert(str(plain_folder()), str(folder), quantize=True, q_bits=bits, q_group_size=32)
        tensors, dense = mx.load(str(folder / "model.safetensors")), {}
        for module in (*MODULES, "model.embed_tokens"):
            words, *beside = (tensors[f"{module}.{name}"] for name in ("weight", "scales", "biases"))
            scales, biases = (x.astype(mx.float32) for x in beside)
            numbers = mx.dequantize(words, scales, biases, group_size=32, bits=bits)
            dense[module] = torch.tensor(numbers.tolist())
        return dense

    return make


# torchao, by transformers


def torchao(make_config: Callable[[], Any], **settings: Any) -> Callable[[Path], Dense]:
    def make(folder: Path) -> Dense:
        lend_kernels()
        config = transformers.TorchAoConfig(quant_type=make_config(), **settings)
        model = transformers.LlamaForCausalLM.from_pretrained(
            plain_folder(), quantization_config=config, dtype=torch.bfloat16, device_map="cpu"
        )
        model.save_pretrained(folder)
        names = [*MODULES, *(["model.embed_tokens"] if settings.get("include_input_output_embeddings") else [])]
        return {name: dense_of_object(model.get_submodule(name).weight) for name in names}

    return make


def dense_of_object(weight: Any) -> Tensor:
    """float32 by torchao itself; its Int4Tensor can only multiply, on a GPU: q * scale + zero, as that is defined."""
    from torchao.quantization import Int4Tensor, IntxUnpackedToInt8Tensor
    from torchao.quantization.quant_primitives import dequantize_affine

    if isinstance(weight, IntxUnpackedToInt8Tensor):  # by the same function as itself, but not in bfloat16
        scale, zero = weight.scale.float(), weight.zero_point
        return dequantize_affine(weight.qdata, weight.block_size, scale, zero, torch.int8, output_dtype=torch.float32)
    if not isinstance(weight, Int4Tensor):
        return weight.dequantize(output_dtype=torch.float32)
    n, half = weight.qdata.shape
    q = torch.stack([weight.qdata << 4 >> 4, weight.qdata >> 4], dim=2).view(n, 2 * half)
    scale, zero = (x.T.float().repeat_interleave(weight.block_size[1], 1) for x in (weight.scale, weight.zero_point))
    return q * scale + zero


def lend_kernels() -> None:
    """What torchao has others do that are to be had with a GPU alone: rounding to 4 bits (mslk's), as those define it,
    and the question whether the activations could be multiplied in 8-bit floats."""
    from torchao.float8 import inference
    from torchao.quantization.quantize_.workflows.int4 import int4_tensor

    def round_rows(w: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
        groups = w.float().view(len(w), -1, group)
        low, high = groups.amin(2), groups.amax(2)
        scale = (high - low).clamp(min=1e-6) / 15
        q = ((groups - low[..., None]) / scale[..., None]).round().clamp(0, 15) - 8
        return q.to(torch.int8).view(w.shape), scale.T.contiguous(), (low + 8 * scale).T.contiguous()

    int4_tensor.int4_row_quantize_zp = round_rows
    int4_tensor.pack_int4 = lambda q: (q[:, ::2] & 15 | q[:, 1::2] << 4).contiguous()
    inference.is_MI300 = lambda: True


def in_many_ways() -> Any:
    from torchao import quantization as ao

    integers = ao.IntxWeightOnlyConfig(torch.int4, ao.PerGroup(32), mapping_type=ao.MappingType.ASYMMETRIC)
    few = ao.Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int3, weight_granularity=ao.PerGroup(32))
    return ao.FqnToConfig(
        {
            "model.layers.0.self_attn.v_proj": ao.Float8DynamicActivationFloat8WeightConfig(granularity=ao.PerTensor()),
            r"re:model\.layers\..*\.[qk]_proj": integers,
            r"re:.*mlp.*": few,
            "_default": ao.Float8WeightOnlyConfig(),
        }
    )


def with_embeddings() -> Any:
    from torchao import quantization as ao

    config = ao.IntxWeightOnlyConfig(torch.int8, ao.PerAxis(0))
    return ao.FqnToConfig({"model.embed_tokens": config, "_default": config})


def torchao_config(name: str, **settings: Any) -> Callable[[], Any]:
    def make() -> Any:
        from torchao import quantization

        return getattr(quantization, f"{name}Config")(**settings)

    return make


# HQQ, by its own linears


def hqq(**sizes: Any) -> Callable[[Path], Dense]:
    """`sizes` of all, or of linears by the names that they end in. transformers kept these linears' state dicts as
    they are; since its version 5 it writes none."""

    def make(folder: Path) -> Dense:
        from hqq.core.quantize import BaseQuantizeConfig, HQQLinear, Quantizer

        model = make_model()
        model.save_pretrained(folder)
        tensors, dense = dict(load_file(folder / "model.safetensors")), {}
        for module in MODULES:
            own = next((value for name, value in sizes.items() if module.endswith(name)), sizes)
            config = BaseQuantizeConfig(**{"axis": 1} | own)
            linear = HQQLinear(model.get_submodule(module), config, False, torch.bfloat16, "cpu")
            del tensors[f"{module}.weight"]
            tensors |= {f"{module}.{key}": value.contiguous() for key, value in linear.state_dict().items()}
            exact = {name: linear.meta[name].float() for name in ("scale", "zero")}
            dense[module] = Quantizer.dequantize(linear.W_q, linear.meta | exact | {"compute_dtype": torch.float32})
        save_file(tensors, folder / "model.safetensors")
        settings = {"quant_method": "hqq", "quant_config": config, "skip_modules": ["lm_head"]}
        content = json.loads((folder / "config.json").read_text()) | {"quantization_config": settings}
        (folder / "config.json").write_text(json.dumps(content))
        return dense

    return make


CASES: dict[str, Callable[[Path], Dense]] = {
    "hqq": hqq(nbits=4, group_size=32),
    "hqq-3": hqq(nbits=3, group_size=32),
    "hqq-8": hqq(nbits=8, group_size=64),  # of rows of 96: groups run on
    "hqq-columns": hqq(
        q_proj={"nbits": 3, "group_size": 32, "axis": 0},
        down_proj={"nbits": 8, "group_size": None, "axis": 0},
        v_proj={"nbits": 4, "group_size": 32},
        proj={"nbits": 4, "group_size": 64, "axis": 0},
    ),
    "hqq-few": hqq(
        q_proj={"nbits": 1, "group_size": 32},
        down_proj={"nbits": 2, "group_size": 16},
        proj={"nbits": 2, "group_size": 32},
    ),
    "torchao-int4": torchao(torchao_config("Int4WeightOnly", group_size=32)),
    "torchao-int8": torchao(torchao_config("Int8DynamicActivationInt8Weight")),
    "torchao-many": torchao(in_many_ways),
    "torchao-embeddings": torchao(with_embeddings, include_input_output_embeddings=True),
    "mlx": mlx(4),
    "mlx-3": mlx(3),
    "gptq": auto_round("auto_gptq", 4, sym=True),
    "gptq-act-order": act_order("gptq", 4),
    "gptq-v2-act-order-3": act_order("gptq_v2", 3),
    "awq": auto_round("auto_awq", 4, sym=False),
    "auto-round": auto_round("auto_round", 4, sym=True),
    "auto-round-asym-2": auto_round("auto_round", 2, sym=False),
    "ct-w4a16": compressed((["Linear"], integers(4)), ignore=("re:.*v_proj",)),
    "ct-w4a16-asym": compressed((["Linear"], integers(4, symmetric=False))),
    "ct-groups": compressed(
        (["re:.*self_attn.*"], integers(8, strategy="channel", group_size=None)), (["re:.*mlp.*"], integers(3))
    ),
    "ct-w8a8": compressed((["Linear"], integers(8, strategy="channel", group_size=None))),
    "ct-fp8": compressed(
        (["re:.*self_attn.*"], floats(8, strategy="tensor")), (["re:.*mlp.*"], floats(8, strategy="channel"))
    ),
    "ct-fp8-block": compressed((["Linear"], floats(8, strategy="block", block_structure=[32, 32]))),
    "ct-nvfp4": compressed((["Linear"], floats(4, strategy="tensor_group", group_size=16))),
    "ct-mxfp4": compressed((["Linear"], floats(4, strategy="group", group_size=32, scale_dtype="torch.uint8"))),
    "bnb-nf4": bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "bnb-fp4": bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
    "bnb-int8": bitsandbytes(load_in_8bit=True),
}  # fmt: skip


def logits(dense: Dense) -> Tensor:
    model = make_model().float()
    for module, weight in dense.items():
        model.get_submodule(module).weight.data = weight
    with torch.inference_mode():
        return model(torch.tensor([PROMPT])).logits[0, -1:]


def numbers(size: int) -> Tensor:
    return torch.sin(torch.arange(1, size + 1, dtype=torch.float64) ** 2)


def main(names: list[str]) -> None:
    known = FIXTURES / "expected.safetensors"
    expected = load_file(known) if known.exists() else {}
    for name in names or CASES:
        scratch, folder = SCRATCH / name, FIXTURES / name
        shutil.rmtree(scratch, ignore_errors=True)
        dense = CASES[name](scratch)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for file in ("model.safetensors", "config.json"):
            shutil.copy(scratch / file, folder)
        expected = {key: tensor for key, tensor in expected.items() if not key.startswith(f"{name}/")}
        for module, weight in dense.items():
            expected[f"{name}/{module}"] = (weight.double() @ numbers(weight.shape[1])).float()
        expected[f"{name}/logits"] = logits(dense)
        save_file(expected, known)


if __name__ == "__main__":
    main(sys.argv[1:])
