"""Matrices in GGML's blocks, packed straight from the file's bytes."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence as Seq
from copy import copy

import torch
from torch import Tensor

from blade import GGMLBlocks
from blade_native.simd.grouped import CODES, FLOATS, HALF, NONE, looked_up
from blade_native.simd.library import CFormat, CLinear, Library
from blade_native.simd.linear import Matrix, PackedLinear, StackedLinear, pack_joined

UNSIGNED, SIGNED = CODES.values()
BRAIN = FLOATS[torch.bfloat16]
KINDS = {  # GGML's number, and the format of the panels but for values: bits, group, scales, offsets, block
    "Q4_0": (2, CFormat(4, 32, HALF, NONE, 0)),
    "Q4_1": (3, CFormat(4, 32, HALF, HALF, 0)),
    "Q5_0": (6, CFormat(5, 32, HALF, NONE, 0)),
    "Q5_1": (7, CFormat(5, 32, HALF, HALF, 0)),
    "IQ4_NL": (20, CFormat(4, 32, HALF, NONE, 0)),
    "MXFP4": (39, CFormat(4, 32, BRAIN, NONE, 0)),
    "Q8_0": (8, CFormat(8, 32, HALF, NONE, 0)),
    "Q2_K": (10, looked_up(CFormat(4, 16, UNSIGNED, UNSIGNED, 256), range(16))),
    "Q3_K": (11, looked_up(CFormat(4, 16, SIGNED, NONE, 256), range(-8, 8))),
    "IQ4_XS": (23, CFormat(4, 32, SIGNED, NONE, 256)),
    "Q4_K": (12, CFormat(4, 32, UNSIGNED, UNSIGNED, 256)),
    "Q5_K": (13, CFormat(5, 32, UNSIGNED, UNSIGNED, 256)),
    "Q6_K": (14, CFormat(6, 16, SIGNED, NONE, 256)),
}


def pack_blocks(
    library: Library, matrices: Seq[GGMLBlocks], bias: Tensor | None, threads: int
) -> PackedLinear | StackedLinear:
    """The panels that `pack_grouped` makes of the same matrices; their kinds are of KINDS."""

    def pack(linear: CLinear, blocks: GGMLBlocks) -> None:
        raw = blocks.raw.contiguous()
        library.pack_blocks(ctypes.byref(linear), raw.data_ptr(), KINDS[blocks.kind][0], threads)

    orders = [None if blocks.order is None else blocks.order.to(torch.int32) for blocks in matrices]
    shaped = [
        Matrix(blocks, _format(blocks), blocks.shape, order) for blocks, order in zip(matrices, orders, strict=True)
    ]
    return pack_joined(library, shaped, bias, threads, pack)


def _format(blocks: GGMLBlocks) -> CFormat:
    form = KINDS[blocks.kind][1]
    return form if blocks.values is None else looked_up(copy(form), blocks.values)
