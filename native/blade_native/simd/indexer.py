"""What keys are chosen by, over the compiled kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from blade import Batch, KeySelection
from blade_native.simd.attention import StepArguments
from blade_native.simd.check import DTYPES, check, check_heads
from blade_native.simd.library import Library

LANES = 16  # numbers of a key that the kernels take together


def covers(kept: Tensor) -> bool:
    """Whether the kernels take keys like these."""
    return kept.dtype in DTYPES and kept.shape[-1] % LANES == 0


class Indexer:
    """The kernels' side of contracts.Ops' ops of the same names. Slots and positions are trusted to be in range."""

    def __init__(self, library: Library, threads: int) -> None:
        self._library, self._threads = library, threads
        self._step: StepArguments | None = None

    def keep_index_keys(
        self, k: Tensor, weight: Tensor, eps: float, cos_sin: Tensor, batch: Batch, kept: Tensor, group: int
    ) -> None:
        step, (num_blocks, block_size, d) = self._arguments(batch), kept.shape
        check_heads("k", k[:, None], kept.dtype, (step.num_tokens, 1, d))
        check("weight", weight, kept.dtype, (d,))
        check("kept", kept, kept.dtype, (num_blocks, block_size, d))
        inputs = k.data_ptr(), k.stride(0), d, weight.data_ptr(), eps, *_table(cos_sin, d)
        shape = group, block_size, kept.data_ptr()
        self._library.keep_index_keys(DTYPES[kept.dtype], step.address, *inputs, *shape, self._threads)

    def select_keys(self, q: Tensor, cos_sin: Tensor, batch: Batch, kept: Tensor, selection: KeySelection) -> Tensor:
        step, (num_blocks, block_size, d) = self._arguments(batch), kept.shape
        check_heads("q", q, kept.dtype, (step.num_tokens, selection.num_heads, d))
        check("kept", kept, kept.dtype, (num_blocks, block_size, d))
        slots = torch.empty((step.num_tokens, selection.most_keys), dtype=torch.int32)
        inputs = q.data_ptr(), q.stride(0), selection.num_heads, d, *_table(cos_sin, d)
        sizes = kept.data_ptr(), selection.group, selection.budget, block_size
        self._library.select_keys(DTYPES[kept.dtype], step.address, *inputs, *sizes, slots.data_ptr(), self._threads)
        return slots

    def _arguments(self, batch: Batch) -> StepArguments:
        if batch.ancestors is not None:
            raise ValueError("keys cannot be chosen by tokens of a tree")
        if self._step is None or self._step.batch is not batch:
            self._step = StepArguments(batch)
            if self._library.recording.tape is not None:
                self._library.recording.steps.append(self._step)
        return self._step


def _table(cos_sin: Tensor, d: int) -> tuple[int, int]:
    rotary_dim = cos_sin.shape[-1]
    check("cos_sin", cos_sin, torch.float32, (cos_sin.shape[0], rotary_dim))
    if rotary_dim % 2 or rotary_dim > d:
        raise ValueError(f"rotary_dim {rotary_dim} does not fit index keys of {d}")
    return cos_sin.data_ptr(), rotary_dim
