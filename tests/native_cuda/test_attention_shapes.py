"""What Python knows of the attention kernels is what their sources say; plans cut steps as the kernels do."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from native_cpu.batches import ragged

from blade_native.cuda import attention_kernels, attention_plan
from blade_native.cuda.attention import shape_of
from blade_native.cuda.attention_kernels import (
    HADAMARD_WARPS,
    HEAD_DIMS,
    MERGE_WARPS,
    PREFILL_WARPS,
    SIMT_WARPS,
    STORE_WARPS,
    Shape,
)
from blade_native.cuda.attention_plan import Plan
from blade_native.cuda.launch import CUDA_NAMES, SOURCES
from blade_native.cuda.source import inline
from blade_native.emulator.declared import checks
from blade_native.kv_codes import MODES

from .attention_world import BF16, F16, F32, kv_spec

TYPES = [(dtype, storage) for dtype in (BF16, F16, F32) for storage in (None, *MODES)]


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize(("dtype", "storage"), TYPES, ids=str)
def test_all_that_is_launched_is_checked(dtype: torch.dtype, storage: str | None, head_dim: int) -> None:
    """By NVRTC for every architecture, with the launch's threads and at least its shared memory."""
    spec = kv_spec(Shape(dtype, storage, head_dim), 1, (2, 1), 16)
    shape = shape_of(spec)
    if shape is None:
        assert (storage, head_dim) == ("int8_affine", 256)  # left to torch
        return
    threads = {
        "kv_store.cu": 32 * STORE_WARPS,
        "paged_simt.cu": 32 * SIMT_WARPS,
        "paged_decode.cu": 32 * shape.decode_ring[0],
        "paged_prefill.cu": 32 * PREFILL_WARPS,
        "paged_merge.cu": 32 * MERGE_WARPS,
        "hadamard.cu": 32 * HADAMARD_WARPS,
    }
    shared = {"paged_decode.cu": shape.decode_shared_bytes, "paged_prefill.cu": shape.prefill_shared_bytes}
    others = [shape.expressions(attention_kernels.TREES)]
    if shape_of(replace(spec, dual_chunks=True)):
        others.append(shape.expressions(attention_kernels.DUAL))
    else:
        assert head_dim == 256  # left to torch
    for source, names in shape.expressions().items():
        declared = {check.expression: check.limits for check in checks(inline(SOURCES / source))}
        for name in names + [name for other in others for name in other.get(source, [])]:
            if source == "paged_merge.cu":  # the same machine code for every storage
                name = f"merge_chunks<{CUDA_NAMES[dtype]}, signed char, {head_dim}>"
            assert threads[source] == declared[name].threads
            assert shared.get(source, 0) <= declared[name].shared


def test_constants_are_those_of_the_sources() -> None:
    text = "".join(
        inline(SOURCES / name)
        for name in ("paged_decode.cu", "paged_simt.cu", "kv_store.cu", "paged_merge.cu", "hadamard.cu")
    )
    found = {name: int(value) for name, value in re.findall(r"constexpr int (\w+) = (\d+);", text)}
    for name in (
        "CHUNK",
        "MAX_CHUNKS",
        "SPLIT_ROWS",
        "DECODE_ROWS",
        "SIMT_WARPS",
        "STORE_WARPS",
        "MERGE_WARPS",
        "HADAMARD_WARPS",
    ):
        assert found[name] == getattr(attention_kernels, name)
    assert attention_plan.PREFILL_ROWS == attention_kernels.SPLIT_ROWS  # a split sequence is one tile


def plan(query_lens: list[int], kv_lens: list[int], group: int, num_sms: int = 100) -> Plan:
    return Plan(ragged(query_lens, kv_lens, 16), group, 2, num_sms)


def test_items_are_the_tiles_of_long_sequences_longest_first() -> None:
    one = plan([1, 40, 4, 10], [100, 40, 100, 300], 4)
    assert one.items is not None
    assert one.items.tolist() == [1, 2, 1, 1, 3, 0, 1, 0]
    assert one.partial_starts is not None
    assert one.partial_starts.tolist() == [0, 1, 1, 5]  # the sequence of 160 rows is not split
    assert one.num_split_tokens == 15


def test_chunks_follow_from_the_longest_split_sequence() -> None:
    def chunks(query_lens: list[int], kv_lens: list[int], window: int = 0, num_sms: int = 100) -> tuple[int, int]:
        split = plan(query_lens, kv_lens, 4, num_sms).split(window)
        return split.max_chunks, split.grid

    assert chunks([1, 1], [256, 3]) == (1, 1)
    assert chunks([1, 1], [257, 3]) == (2, 2)
    assert chunks([1, 40], [257, 5000]) == (2, 2)  # the long one is not split
    assert chunks([1, 1], [100_000, 3]) == (32, 32)
    assert chunks([1, 1], [100_000, 3], num_sms=8) == (32, 16)  # 64 blocks of threads for 2 * 2 heads of sequences
    assert chunks([1, 1], [100_000, 3], window=100) == (1, 1)
    assert chunks([1, 1], [100_000, 3], window=241) == (1, 1)
    assert chunks([1, 1], [100_000, 3], window=242) == (2, 2)  # begins at an even 16
