"""Checkpoints in memory made into those of a weight format, by the plainest rounding, with what they then stand for."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch.nn import functional as F

if TYPE_CHECKING:
    from torch import Tensor

Written: TypeAlias = "tuple[dict[str, Tensor], Tensor]"  # a matrix's tensors by their last names, and W [N, K] float32
PLAIN = {
    "embed_tokens",
    "wte",
    "ngram_embedding",
    "lm_head",
    "gate",
    "router",
    "shared_expert_gate",
    "in_proj_ba",
    "in_proj_a",
    "in_proj_b",
}
AWQ_COLUMNS = [0, 2, 4, 6, 1, 3, 5, 7]
GROUP = 32
FP8_MOST, FP4_MOST = 448.0, 6.0
FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
E2M1 = torch.cat([FP4, -FP4])


@dataclass(frozen=True)
class Format:
    """A way to write a matrix, and what config.json says of it."""

    settings: dict[str, Any]
    write: Callable[[Tensor], Written]


def spread(values: Tensor, group: int, k: int) -> Tensor:
    """What groups have, for each of their numbers: [N, groups] -> [N, K]; the last group may end early."""
    return values.repeat_interleave(group, 1)[:, :k]


def groups_of(w: Tensor, group: int) -> Tensor:
    """[N, groups, group], filled up with zeros."""
    return F.pad(w, (0, -w.shape[1] % group)).view(len(w), -1, group)


def symmetric(w: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Integers around 0 and scales, float16 ones; and W."""
    most = 2 ** (bits - 1) - 1
    scales = (groups_of(w, group).abs().amax(2) / most).half()
    wide = spread(scales.float(), group, w.shape[1])
    q = (w / wide).round().clamp(-most - 1, most)
    return q, scales, q * wide


def with_zeros(w: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Integers of 4 bits, scales, zeros; and W."""
    low, high = groups_of(w, group).amin(2), groups_of(w, group).amax(2)
    scales = ((high - low) / 15).half()
    zeros = (-low / scales.float()).round().clamp(0, 15)
    wide, middle = (spread(x.float(), group, w.shape[1]) for x in (scales, zeros))
    q = (w / wide + middle).round().clamp(0, 15)
    return q, scales, zeros, (q - middle) * wide


def pack(q: Tensor) -> Tensor:
    """[R, C] below 16 -> [R, C / 8] int32, the first number lowest."""
    eights = q.long().view(len(q), -1, 8)
    words = (eights << torch.arange(0, 32, 4)).sum(2)
    return (words - (words >> 31 << 32)).int()


def gptq(w: Tensor, group: int = GROUP) -> Written:
    q, scales, exact = symmetric(w, 4, group)
    zeros = torch.full_like(scales.T, 7)  # less 1
    return {"qweight": pack(q + 8).T, "qzeros": pack(zeros), "scales": scales.T}, exact


def awq(w: Tensor, group: int = GROUP) -> Written:
    q, scales, zeros, exact = with_zeros(w, group)

    def columns(x: Tensor) -> Tensor:
        return pack(x.T.reshape(x.shape[1], -1, 8)[:, :, AWQ_COLUMNS].flatten(1))

    return {"qweight": columns(q), "qzeros": columns(zeros), "scales": scales.T}, exact


def compressed_int4(w: Tensor, group: int = GROUP) -> Written:
    q, scales, exact = symmetric(w, 4, group)
    return {"weight_packed": pack(q + 8), "weight_scale": scales, "weight_shape": torch.tensor(w.shape)}, exact


def compressed_int8(w: Tensor) -> Written:
    q, scales, exact = symmetric(w, 8, w.shape[1])
    return {"weight": q.to(torch.int8), "weight_scale": scales}, exact


def floats(w: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """8-bit floats, scales by block, and W."""
    (n, k), (rows, columns) = w.shape, block
    blocks = F.pad(w, (0, -k % columns, 0, -n % rows)).unfold(0, rows, rows).unfold(1, columns, columns)
    scales = blocks.abs().amax((2, 3)) / FP8_MOST
    wide = scales.repeat_interleave(rows, 0)[:n].repeat_interleave(columns, 1)[:, :k]
    q = (w / wide).to(torch.float8_e4m3fn)
    return q, scales, q.float() * wide


def fp8_rows(w: Tensor) -> Written:
    q, scales, exact = floats(w, (1, w.shape[1]))
    return {"weight": q, "weight_scale": scales}, exact


def fp8_matrix(w: Tensor) -> Written:
    q, scales, exact = floats(w, tuple(w.shape))
    return {"weight": q, "weight_scale": scales.view(())}, exact


def fp8_blocks(w: Tensor, group: int = GROUP) -> Written:
    q, scales, exact = floats(w, (group, group))
    return {"weight": q, "weight_scale_inv": scales}, exact


def mxfp8(w: Tensor) -> Written:
    exponents = (groups_of(w, GROUP).abs().amax(2) / FP8_MOST).log2().ceil()
    wide = spread(torch.exp2(exponents), GROUP, w.shape[1])
    q = (w / wide).to(torch.float8_e4m3fn)
    return {"weight": q, "weight_scale": (exponents + 127).to(torch.uint8)}, q.float() * wide


def codes(w: Tensor, wide: Tensor, table: Tensor) -> Tensor:
    """The number of the table's entry next to each of w / wide: [N, K]."""
    entries, numbers = table.sort()
    return numbers[torch.bucketize(w / wide, (entries[1:] + entries[:-1]) / 2)].to(torch.uint8)


def nvfp4(w: Tensor) -> Written:
    """With a scale of the whole that multiplies, a power of two here; compressed-tensors' divides."""
    whole = torch.exp2((w.abs().max() / (FP4_MOST * FP8_MOST)).log2().ceil())
    scales = (groups_of(w, 16).abs().amax(2) / FP4_MOST / whole).to(torch.float8_e4m3fn)
    wide = spread(scales.float() * whole, 16, w.shape[1]).clamp(min=1e-9)
    q = codes(w, wide, E2M1)
    packed = q[:, ::2] | q[:, 1::2] << 4
    return {"weight": packed, "weight_scale": scales, "weight_scale_2": whole}, E2M1[q.long()] * wide


def compressed_nvfp4(w: Tensor) -> Written:
    own, exact = nvfp4(w)
    names = {"weight_packed": own["weight"], "weight_scale": own["weight_scale"]}
    return names | {"weight_global_scale": 1 / own["weight_scale_2"]}, exact


def mxfp4(w: Tensor) -> Written:
    exponents = (groups_of(w, GROUP).abs().amax(2) / FP4_MOST).log2().ceil()
    wide = spread(torch.exp2(exponents), GROUP, w.shape[1])
    q = codes(w, wide, E2M1)
    tensors = {"weight_packed": q[:, ::2] | q[:, 1::2] << 4, "weight_scale": (exponents + 127).to(torch.uint8)}
    return tensors, E2M1[q.long()] * wide


def nf4(w: Tensor) -> Written:
    """Blocks of 64 that run on over rows; W by the table of integers that the reader makes of its own."""
    from blade_bitsandbytes.blocks import integer_table

    table = torch.linspace(-1, 1, 16)
    largest, integers = integer_table(tuple(table.tolist()))
    absmax = w.flatten().view(-1, 16).abs().amax(1)
    absmax = F.pad(absmax, (0, -len(absmax) % 4)).view(-1, 4).amax(1).half().float()
    wide = absmax.repeat_interleave(64)[: w.numel()].view(w.shape)
    q = codes(w, wide, table)
    packed = (q.flatten()[::2] << 4 | q.flatten()[1::2])[:, None]
    state = json.dumps({"blocksize": 64, "shape": list(w.shape), "quant_type": "nf4", "dtype": "float32"})
    tensors = {"weight": packed, "weight.absmax": absmax, "weight.quant_map": table}
    tensors["weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(state.encode()), dtype=torch.uint8)
    return tensors, torch.tensor(integers, dtype=torch.float32)[q.long()] * (wide / largest)


def bytes_by_row(w: Tensor) -> Written:
    """bitsandbytes' int8."""
    q, scales, exact = symmetric(w, 8, w.shape[1])
    return {"weight": q.to(torch.int8), "SCB": scales.float().flatten() * 127}, exact


def mlx(w: Tensor) -> Written:
    low, high = groups_of(w, GROUP).amin(2), groups_of(w, GROUP).amax(2)
    scales, minima = ((high - low) / 15).half(), low.half()
    wide, least = (spread(x.float(), GROUP, w.shape[1]) for x in (scales, minima))
    q = ((w - least) / wide).round().clamp(0, 15)
    return {"weight": pack(q).view(torch.uint32), "scales": scales, "biases": minima}, q * wide + least


def torchao_int4(w: Tensor) -> Written:
    """Groups of 16, for rows have to divide into them."""
    q, scales, exact = symmetric(w, 4, 16)
    q = q.to(torch.int8)
    packed = q[:, ::2] & 15 | q[:, 1::2] << 4
    tensors = {"qdata": packed, "scale": scales.T, "zero_point": torch.zeros_like(scales.T)}
    return {f"_weight_{name}": tensor for name, tensor in tensors.items()}, exact


def torchao_int8(w: Tensor) -> Written:
    q, scales, exact = symmetric(w, 8, w.shape[1])
    return {"_weight_qdata": q.to(torch.int8), "_weight_scale": scales.float()}, exact


def hqq(w: Tensor) -> Written:
    """Groups that run on over rows."""
    groups = w.reshape(-1, 16)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    scale = ((high - low) / 15).half()
    zero = (-low / scale.float()).half()
    q = (groups / scale.float() + zero.float()).round().clamp(0, 15)
    minima = (-zero.float() * scale.float()).half()
    codes = F.pad(q, (0, 0, 0, len(q) % 2)).to(torch.uint8)
    tensors = {"W_q": codes[: len(codes) // 2] << 4 | codes[len(codes) // 2 :], "scale": scale, "zero": zero}
    tensors |= {"nbits": torch.tensor(4, dtype=torch.int32), "shape": torch.tensor(w.shape)}
    return tensors, (q * scale.float() + minima.float()).view(w.shape)


def compressed(kind: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights}
    return {"quant_method": "compressed-tensors", "format": kind, "config_groups": {"group_0": group}}


def torchao(kind: str) -> dict[str, Any]:
    return {"quant_method": "torchao", "quant_type": {"default": {"_type": f"{kind}Config", "_data": {}}}}


def formats(group: int) -> dict[str, Format]:
    """Those that have groups of a size of their own choice in groups of `group`."""
    return {
        "gptq": Format(
            {"quant_method": "gptq", "bits": 4, "group_size": group, "sym": True}, partial(gptq, group=group)
        ),
        "awq": Format({"quant_method": "awq", "bits": 4, "group_size": group}, partial(awq, group=group)),
        "auto-round": Format(
            {"quant_method": "auto-round", "bits": 4, "group_size": group, "sym": True}, partial(gptq, group=group)
        ),
        "ct-int4": Format(
            compressed("pack-quantized", num_bits=4, strategy="group", group_size=group),
            partial(compressed_int4, group=group),
        ),
        "ct-w8a8": Format(compressed("int-quantized", num_bits=8, strategy="channel"), compressed_int8),
        "ct-fp8": Format(compressed("float-quantized", num_bits=8, type="float", strategy="channel"), fp8_rows),
        "ct-nvfp4": Format(
            compressed("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16),
            compressed_nvfp4,
        ),
        "ct-mxfp4": Format(
            compressed("mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=GROUP), mxfp4
        ),
        "ct-mxfp8": Format(
            compressed("mxfp8-quantized", num_bits=8, type="float", strategy="group", group_size=GROUP), mxfp8
        ),
        "fbgemm-fp8": Format({"quant_method": "fbgemm_fp8"}, fp8_rows),
        "fp8": Format({"quant_method": "fp8", "weight_block_size": [group, group]}, partial(fp8_blocks, group=group)),
        "bnb-nf4": Format({"quant_method": "bitsandbytes", "load_in_4bit": True}, nf4),
        "bnb-int8": Format({"quant_method": "bitsandbytes", "load_in_8bit": True}, bytes_by_row),
        "modelopt-nvfp4": Format({"quant_method": "modelopt", "quant_algo": "NVFP4"}, nvfp4),
        "modelopt-fp8": Format({"quant_method": "modelopt", "quant_algo": "FP8"}, fp8_matrix),
        "mlx": Format({"quant_method": "mlx", "bits": 4, "group_size": GROUP}, mlx),
        "hqq": Format({"quant_method": "hqq"}, hqq),
        "torchao-int4": Format(torchao("Int4WeightOnly"), torchao_int4),
        "torchao-int8": Format(torchao("Int8WeightOnly"), torchao_int8),
    }


FORMATS = formats(GROUP)


def quantised(tensors: dict[str, Tensor], write: Callable[[Tensor], Written]) -> tuple[dict[str, Tensor], set[str]]:
    """The checkpoint with its matrices quantised, and their prefixes; `tensors` has from now on what they stand for.
    Small matrices and one of each model's keys stay plain, as tools leave what they are told to."""
    made, prefixes, spared = dict(tensors), set[str](), False
    for name, w in tensors.items():
        prefix, _, last = name.rpartition(".")
        own = prefix.rpartition(".")[2]
        if last != "weight" or w.dim() != 2 or own in PLAIN or min(w.shape) < 16:
            continue
        if own == "k_proj" and not spared:
            spared = True
            continue
        del made[name]
        parts, tensors[name] = write(w.float())
        made |= {f"{prefix}.{part}": tensor.contiguous() for part, tensor in parts.items()}
        prefixes.add(prefix)
    return made, prefixes
