"""Matrices in GGML's blocks, packed straight from the file's bytes."""

from __future__ import annotations

import ctypes

from torch import Tensor

from blade import GGMLBlocks
from blade_native.simd.grouped import CODES, HALF, NONE
from blade_native.simd.library import CFormat, CLinear, Library
from blade_native.simd.linear import PackedLinear, bias_at, pad_bias

UNSIGNED, SIGNED = CODES.values()
KINDS = {  # GGML's number, and the format of the panels: bits, group, scales, offsets, block
    "Q4_0": (2, CFormat(4, 32, HALF, NONE, 0)),
    "Q4_1": (3, CFormat(4, 32, HALF, HALF, 0)),
    "Q5_0": (6, CFormat(5, 32, HALF, NONE, 0)),
    "Q5_1": (7, CFormat(5, 32, HALF, HALF, 0)),
    "Q8_0": (8, CFormat(8, 32, HALF, NONE, 0)),
    "Q4_K": (12, CFormat(4, 32, UNSIGNED, UNSIGNED, 256)),
    "Q5_K": (13, CFormat(5, 32, UNSIGNED, UNSIGNED, 256)),
    "Q6_K": (14, CFormat(6, 16, SIGNED, NONE, 256)),
}


def pack_blocks(library: Library, blocks: GGMLBlocks, bias: Tensor | None, threads: int) -> PackedLinear:
    """The panels that `pack_grouped` makes of the same matrix; its kind is one of KINDS."""
    number, form = KINDS[blocks.kind]
    bias, raw = pad_bias(bias), blocks.raw.contiguous()
    linear = CLinear(form, *blocks.shape, None, bias_at(bias))
    weights = library.regions.allocate(library.packed_bytes(ctypes.byref(linear)))
    linear.weights = weights.data_ptr()
    library.pack_blocks(ctypes.byref(linear), raw.data_ptr(), number, threads)
    return PackedLinear(library, linear, None, weights, bias, threads)
