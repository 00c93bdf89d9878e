"""Against the gguf package's own dequantisation, bit for bit."""

import warnings

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType

from blade.checkpoint.gguf import GGMLType
from blade.checkpoint.gguf import dequant as gguf_dequant
from blade.checkpoint.gguf.dequant import dequantize

BLOCKED = [kind for kind in GGMLType if kind.block_size > 1]


def raw_blocks(kind: GGMLType, num_rows: int, num_blocks: int) -> np.ndarray:
    """All bytes random, so the scales are of any size, sign and kind: infinities, NaNs and subnormals too."""
    return np.random.default_rng(kind).integers(0, 256, (num_rows, num_blocks * kind.block_bytes), dtype=np.uint8)


def reference(raw: np.ndarray, kind: GGMLType) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # inf * 0
        if kind == GGMLType.Q1_0:  # which the package knows by name alone
            blocks = raw.reshape(-1, kind.block_bytes)
            signs = 2 * np.unpackbits(blocks[:, 2:], axis=1, bitorder="little").astype(np.float32) - 1
            return torch.from_numpy(signs * blocks[:, :2].copy().view(np.float16)).view(len(raw), -1)
        return torch.from_numpy(gguf.quants.dequantize(raw, GGMLQuantizationType(kind)))


@pytest.mark.parametrize("kind", GGMLType, ids=lambda kind: kind.name)
def test_sizes_are_ggml_s(kind: GGMLType) -> None:
    assert (kind.block_size, kind.block_bytes) == gguf.GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    assert GGMLQuantizationType(kind).name == kind.name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", BLOCKED, ids=lambda kind: kind.name)
def test_equals_the_reference(kind: GGMLType, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_dequant, "CHUNK", 16 * kind.block_size)  # 111 blocks: six whole chunks and a short one
    raw = raw_blocks(kind, 37, 3)
    found = dequantize(kind, torch.from_numpy(raw), dtype)
    assert found.dtype == dtype
    assert found.shape == (37, 3 * kind.block_size)
    torch.testing.assert_close(found, reference(raw, kind).to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", BLOCKED, ids=lambda kind: kind.name)
def test_one_block_at_any_place(kind: GGMLType) -> None:
    raw = raw_blocks(kind, 3, 1)
    found = [dequantize(kind, row[None], torch.float32) for row in torch.from_numpy(raw)]
    torch.testing.assert_close(torch.cat(found), reference(raw, kind), rtol=0, atol=0, equal_nan=True)


def test_plain_types_are_not_copied() -> None:
    raw = torch.arange(48, dtype=torch.uint8).view(3, 16)
    found = dequantize(GGMLType.BF16, raw, torch.bfloat16)
    assert found.data_ptr() == raw.data_ptr()
    assert dequantize(GGMLType.BF16, raw, torch.float32).equal(found.float())


def test_the_number_of_threads_is_restored() -> None:
    before = torch.get_num_threads()
    dequantize(GGMLType.Q8_0, torch.zeros(1, 34, dtype=torch.uint8), torch.float32)
    assert torch.get_num_threads() == before
