"""Ops of recurrent layers over the compiled kernels: short convolutions, the gated delta rule, gated norms."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from blade import Batch
from blade_native.simd.check import DTYPES, check, check_heads
from blade_native.simd.library import CSlots, Library

WINDOWS = (2, 3, 4)  # of convolutions
LANES = 16  # columns of a state that the kernels take together


class SlotArguments:
    """What the layers of one step pass to the kernels alike, checked once: `Slots` of api.h."""

    def __init__(self, batch: Batch) -> None:
        self._struct = CSlots()
        self.address = ctypes.addressof(self._struct)
        self.update(batch)

    def update(self, batch: Batch) -> None:
        """Another step in the same place."""
        num_seqs = len(batch.context_lens)
        if batch.state_in is None or batch.state_out is None:
            raise ValueError("the batch says nothing of the slots of states")
        check("cu_seqlens", batch.cu_seqlens, torch.int32, (num_seqs + 1,))
        check("state_in", batch.state_in, torch.int32, (num_seqs,))
        check("state_out", batch.state_out, torch.int32, (num_seqs,))
        self.batch = batch
        slots = batch.state_in.data_ptr(), batch.state_out.data_ptr()
        self._struct.__init__(batch.cu_seqlens.data_ptr(), *slots, num_seqs)  # type: ignore[misc]


class Recurrence:
    """The kernels' side of contracts.Ops' ops of the same names. Slots are trusted to be in range."""

    def __init__(self, library: Library, threads: int) -> None:
        self._library, self._threads = library, threads
        self._slots: SlotArguments | None = None

    def short_conv(self, x: Tensor, weight: Tensor, batch: Batch, state: Tensor) -> Tensor:
        channels, window = weight.shape
        check_heads("x", x[:, None], x.dtype, (len(x), 1, channels))
        check("weight", weight, x.dtype, (channels, window))
        check("state", state, x.dtype, (len(state), channels, window - 1))
        y = x.new_empty((len(x), channels))
        inputs = x.data_ptr(), x.stride(0), channels, window, weight.data_ptr()
        places = state.data_ptr(), y.data_ptr()
        self._library.short_conv(DTYPES[x.dtype], self._arguments(batch), *inputs, *places, self._threads)
        return y

    def gated_delta(
        self, q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, decay: Tensor, dt_bias: Tensor, batch: Batch,
        state: Tensor,
    ) -> Tensor:  # fmt: skip
        (num_tokens, num_k_heads, key_dim), (_, num_heads, value_dim) = k.shape, v.shape
        for name, x, heads, dim in (("q", q, num_k_heads, key_dim), ("k", k, num_k_heads, key_dim),
                                    ("v", v, num_heads, value_dim)):  # fmt: skip
            check_heads(name, x, v.dtype, (num_tokens, heads, dim))
        for name, x in (("a", a), ("b", b)):
            check_heads(name, x[:, None], v.dtype, (num_tokens, 1, num_heads))
        for name, x in (("decay", decay), ("dt_bias", dt_bias)):
            check(name, x, torch.float32, (num_heads,))
        check("state", state, torch.float32, (len(state), num_heads, key_dim, value_dim))
        if num_heads % num_k_heads:
            raise ValueError(f"{num_k_heads} heads of k do not divide {num_heads} of v")
        out = v.new_empty(v.shape)
        inputs = [x.data_ptr() for x in (q, k, v, a, b)], [x.stride(0) for x in (q, k, v, a, b)]
        shape = num_k_heads, num_heads, key_dim, value_dim
        places = decay.data_ptr(), dt_bias.data_ptr(), state.data_ptr(), out.data_ptr()
        self._library.gated_delta(
            DTYPES[v.dtype], self._arguments(batch), *inputs[0], *inputs[1], *shape, *places, self._threads
        )
        return out

    def gated_rms_norm(self, x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
        num_tokens, num_heads, d = x.shape
        check("x", x, x.dtype, (num_tokens, num_heads, d))
        check_heads("gate", gate, x.dtype, (num_tokens, num_heads, d))
        check("weight", weight, x.dtype, (d,))
        y = torch.empty_like(x)
        shape = num_tokens, num_heads, d, gate.stride(0)
        inputs = x.data_ptr(), gate.data_ptr()
        self._library.gated_rms_norm(
            DTYPES[x.dtype], *inputs, *shape, weight.data_ptr(), eps, y.data_ptr(), self._threads
        )
        return y

    def _arguments(self, batch: Batch) -> int:
        if self._slots is None or self._slots.batch is not batch:
            self._slots = SlotArguments(batch)
            if self._library.recording.tape is not None:
                self._library.recording.steps.append(self._slots)
        return self._slots.address
