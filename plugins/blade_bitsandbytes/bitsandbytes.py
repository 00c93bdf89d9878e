"""contracts.Quantization of bitsandbytes: 4 bits by a table in blocks (Dettmers et al. 2023), or int8 (2022)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from blade import CheckpointError
from blade.nn import GroupedQuantization, Matrix
from blade.nn.format_settings import read_settings
from blade.nn.packing import checked, checked_scales, grouped, grouped_matrix, kept_group, matrix_shape
from blade_bitsandbytes.blocks import read_blocks

if TYPE_CHECKING:
    from collections.abc import Mapping

    from blade import GroupedWeight
    from blade.contracts import Weights

FIXED: dict[str, Any] = {
    "bnb_4bit_quant_storage": ("uint8",),
    "llm_int8_has_fp16_weight": (False,),
}
KNOWN = {  # which modules are plain, and how the others are kept, is seen from their tensors
    "_load_in_4bit", "_load_in_8bit", "load_in_4bit", "load_in_8bit", "bnb_4bit_compute_dtype", "bnb_4bit_quant_type",
    "bnb_4bit_use_double_quant", "llm_int8_enable_fp32_cpu_offload", "llm_int8_skip_modules", "llm_int8_threshold",
}  # fmt: skip
MAX_INT8 = 127


class BitsAndBytes(GroupedQuantization):
    """Tables are rounded to integers: see `Blocks.values`."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        keys = read_settings(settings, KNOWN, FIXED)
        four = keys.flag("load_in_4bit", keys.flag("_load_in_4bit", False))
        self.label = f"bitsandbytes, {keys.text('bnb_4bit_quant_type', 'fp4') if four else 'int8'}"

    def matrix(self, prefix: str, weights: Weights) -> Matrix | None:
        name, names = f"{prefix}.weight", weights.names()
        if f"{name}.absmax" in names:
            blocks = read_blocks(name, weights)
            return grouped_matrix(*blocks.shape, 4, blocks.group)
        if f"{prefix}.SCB" in names:
            n, k = matrix_shape(name, weights)
            return grouped_matrix(n, k, 8, k)
        if weights.get(name).dtype.itemsize == 1:
            raise CheckpointError(
                f"The checkpoint has neither {name}.absmax nor {prefix}.SCB, without which {name} means nothing."
            )
        return None

    def weight(self, prefix: str, weights: Weights) -> GroupedWeight:
        name = f"{prefix}.weight"
        if f"{name}.absmax" in weights.names():
            return read_blocks(name, weights).weight(weights)
        return _int8(prefix, weights)


def _int8(prefix: str, weights: Weights) -> GroupedWeight:
    """w = q SCB / 127, a scale per row; `weight_format`, where it is there, is 0: row by row."""
    name, layout = f"{prefix}.weight", f"{prefix}.weight_format"
    n, k = matrix_shape(name, weights)
    if layout in weights.names() and bool(checked(layout, weights, None, torch.uint8).any()):
        raise CheckpointError(
            f"Tensor {layout} is not 0: {name} is laid out for a device of its own.", "Save it row by row."
        )
    q = checked(name, weights, (n, k), torch.int8).contiguous().view(torch.uint8) ^ 128
    scales = checked_scales(f"{prefix}.SCB", weights, (n,)).float() / MAX_INT8
    kept = kept_group(k, k)
    return grouped(q, 8, kept, scales[:, None].expand(n, k // kept).contiguous(), None)
