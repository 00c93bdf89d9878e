"""CUDA graphs: a decode step's launches, torch's and our own, recorded once per batch size and replayed as one.

A step in which every sequence has one token is padded to the next size that was recorded. All that differs between two
such steps is read from device memory: the graph runs on buffers of its own, into which the batch is copied. Padding
rows have slot -1 and length 0, so that attention stores nothing for them and reads nothing.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch

from blade import Batch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from blade import CaptureOptions, KVCache
    from blade.contracts import Model


class Recorder(Protocol):
    """What turns launches into something that can be replayed."""

    def record(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """A function that repeats what `run` launches, and the tensor that `run` returned: each replay fills it."""
        ...


class CudaRecorder:
    """torch.cuda.graph on a stream of its own. All graphs share one memory pool, for only one runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool: Any = None

    def record(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """`run` is called twice before it is recorded: libraries make their handles and workspaces at the first call,
        kernels are compiled and loaded, attention makes its plan; none of it may happen while recording."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            run()
            run()
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            out = run()
        self._pool = self._pool or graph.pool()
        return graph.replay, out


@dataclass(slots=True, frozen=True)
class Recorded:
    """The step of one batch size."""

    replay: Callable[[], None]
    logits: Tensor  # [size, vocab_size]


class GraphedForward:
    """A model's forward on one KV cache: replays steps of decodes, runs all others as they are."""

    def __init__(
        self, model: Model, kv: KVCache, options: CaptureOptions, recorder: Recorder, device: torch.device
    ) -> None:
        """Records options.batch_sizes, at least one, at once."""
        self.model = model
        self.sizes = sorted(set(options.batch_sizes))
        self._kv = kv
        max_blocks = -(-options.max_context // options.block_size)
        self._inputs = padding(self.sizes[-1], max_blocks, options.max_context, device)
        largest_first = reversed(self.sizes)  # the others find room in its memory
        self.recorded = {size: self._record(size, recorder) for size in largest_first}

    @torch.inference_mode()
    def _record(self, size: int, recorder: Recorder) -> Recorded:
        batch = first(self._inputs, size)
        return Recorded(*recorder.record(lambda: self.model.forward(batch, self._kv)))

    def __call__(self, batch: Batch) -> Tensor:
        """Logits [R, vocab_size]; a replay's are overwritten by the next one."""
        size = self.size_for(batch)
        if size is None:
            return self.model.forward(batch, self._kv)
        num_seqs, recorded = len(batch.query_lens), self.recorded[size]
        self._fill(batch, num_seqs, size)
        recorded.replay()
        return recorded.logits[:num_seqs]

    def size_for(self, batch: Batch) -> int | None:
        """The recorded size that the step fits in; None for one that has to run as it is."""
        num_seqs = len(batch.query_lens)
        decodes = batch.max_query_len == 1 and len(batch.logits_rows) == num_seqs
        fits = num_seqs <= self.sizes[-1] and batch.block_tables.shape[1] <= self._inputs.block_tables.shape[1]
        return self.sizes[bisect.bisect_left(self.sizes, num_seqs)] if decodes and fits else None

    def _fill(self, batch: Batch, num_seqs: int, size: int) -> None:
        inputs = self._inputs
        for static, given in (
            (inputs.input_ids, batch.input_ids),
            (inputs.positions, batch.positions),
            (inputs.slots, batch.slots),
            (inputs.context_lens, batch.context_lens),
        ):
            static[:num_seqs].copy_(given)
        inputs.block_tables[:num_seqs, : batch.block_tables.shape[1]].copy_(batch.block_tables)
        if num_seqs < size:  # what an earlier step left there
            inputs.input_ids[num_seqs:size] = 0
            inputs.positions[num_seqs:size] = 0
            inputs.slots[num_seqs:size] = -1
            inputs.context_lens[num_seqs:size] = 0


def padding(num_seqs: int, max_blocks: int, max_context: int, device: torch.device) -> Batch:
    """A step of decodes with nothing in it. The lengths on the host are the longest there can be: they are what grids
    are made for, while the kernels go by those on the device."""

    def filled(value: int, dtype: torch.dtype) -> Tensor:
        return torch.full((num_seqs,), value, dtype=dtype, device=device)

    return Batch(
        input_ids=filled(0, torch.int64),
        positions=filled(0, torch.int64),
        slots=filled(-1, torch.int64),
        cu_seqlens=torch.arange(num_seqs + 1, dtype=torch.int32, device=device),
        context_lens=filled(0, torch.int32),
        block_tables=torch.zeros(num_seqs, max_blocks, dtype=torch.int32, device=device),
        logits_rows=torch.arange(num_seqs, device=device),
        query_lens=[1] * num_seqs,
        kv_lens=[max_context] * num_seqs,
    )


def first(batch: Batch, num_seqs: int) -> Batch:
    """The first sequences of a step of decodes, on the same memory."""
    return replace(
        batch,
        input_ids=batch.input_ids[:num_seqs],
        positions=batch.positions[:num_seqs],
        slots=batch.slots[:num_seqs],
        cu_seqlens=batch.cu_seqlens[: num_seqs + 1],
        context_lens=batch.context_lens[:num_seqs],
        block_tables=batch.block_tables[:num_seqs],
        logits_rows=batch.logits_rows[:num_seqs],
        query_lens=batch.query_lens[:num_seqs],
        kv_lens=batch.kv_lens[:num_seqs],
    )
