"""GGML's blocks packed as they lie in a file: the panels that the way through grouped weights makes, byte for byte."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from blade import GGMLBlocks
from blade.checkpoint.gguf import GGMLType
from blade.checkpoint.gguf.blocks import VALUES
from blade.checkpoint.gguf.grouped import grouped
from blade_native.reference import TorchOps
from blade_native.simd.blocks import KINDS, pack_blocks
from blade_native.simd.library import Library
from blade_native.simd.linear import StackedLinear
from blade_native.simd.ops import SimdOps
from blade_native.simd.quantized import pack_quantized

SLOW_WAY = (GGMLType.TQ1_0, GGMLType.TQ2_0, GGMLType.Q1_0)  # rare ones
BLOCKED = [kind for kind in GGMLType if kind.bits and kind not in SLOW_WAY]
MINIMA = {GGMLType.Q2_K: 83, GGMLType.Q4_K: 3, GGMLType.Q5_K: 3}  # where the half of the minima ends
SHAPES = [(1, 1), (31, 3), (70, 2), (128, 5)]  # rows, blocks in a row


def blocks_of(kind: GGMLType, n: int, num_blocks: int) -> GGMLBlocks:
    """All bytes random, but for minima of NaN: torch negates them to another NaN."""
    raw = np.random.default_rng(100 * kind + n).integers(0, 256, (n, num_blocks, kind.block_bytes), dtype=np.uint8)
    if kind in MINIMA:
        raw[:, :, MINIMA[kind]] &= 0xBF
    return GGMLBlocks(kind.name, (n, num_blocks * kind.block_size), torch.from_numpy(raw).view(n, -1), VALUES.get(kind))


def test_all_kinds_that_blade_reads_are_taken_but_for_the_rare() -> None:
    assert {kind.name: kind.value for kind in BLOCKED} == {name: number for name, (number, _) in KINDS.items()}


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("kind", BLOCKED, ids=lambda kind: kind.name)
def test_panels_are_those_of_grouped_weights(library: Library, kind: GGMLType, threads: int) -> None:
    for n, num_blocks in SHAPES:
        blocks = blocks_of(kind, n, num_blocks)
        found = pack_blocks(library, [blocks], None, threads)
        want = pack_quantized(library, [grouped(kind, blocks.raw)], None, threads)
        assert found.weights.any()
        assert found.weights.equal(want.weights)
        assert bytes(found._linear.format) == bytes(want._linear.format)


def test_stacked_they_multiply_as_grouped_weights_do(ops: SimdOps) -> None:
    kinds = (GGMLType.Q4_K, GGMLType.Q6_K, GGMLType.Q8_0, GGMLType.Q2_K, GGMLType.IQ4_XS)
    blocks = [blocks_of(kind, n, 512 // kind.block_size) for kind, n in zip(kinds, (70, 33, 1, 32, 9), strict=True)]
    bias, x = torch.randn(145), torch.randn(5, 512)
    found = ops.blocks_linear(blocks, bias)
    want = ops.quantized_linear([grouped(GGMLType[part.kind], part.raw) for part in blocks], bias)
    assert isinstance(found, StackedLinear)
    torch.testing.assert_close(found(x), want(x), rtol=0, atol=0, equal_nan=True)


def test_a_kind_no_kernel_knows_is_left_to_grouped_weights(ops: SimdOps) -> None:
    known = blocks_of(GGMLType.Q8_0, 2, 1)
    unknown = GGMLBlocks("TQ2_0", (2, 256), torch.zeros(2, 66, dtype=torch.uint8))
    assert ops.blocks_linear([known, unknown], None) is None
    assert TorchOps().blocks_linear([known], None) is None
