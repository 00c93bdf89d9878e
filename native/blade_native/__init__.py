"""The devices blade runs on: their op sets (``--device``) and the paged attention (``--attention``) they share."""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from blade import hookimpl
from blade_native.host import keep_freed_memory

if TYPE_CHECKING:
    from blade.contracts import Attention, Ops
    from blade_native.simd.library import Library

LARGE_MATRIX = 4 << 20  # bytes of plain numbers, on their way into packed ones
MIN_CAPABILITY = (8, 0)  # Ampere: the first with cp.async and bfloat16 on tensor cores, which the CUDA kernels use
log = logging.getLogger("blade.native")


def cpu_ops(threads: int | None, library: Library | None = None) -> Ops:
    """The compiled kernels; where they are missing, oneDNN's linears and torch, with a word on what that costs."""
    from blade_native.cpu import CpuOps
    from blade_native.simd.library import Unavailable, load
    from blade_native.simd.ops import SimdOps

    base = CpuOps(threads)
    try:
        return SimdOps(base, library or load(), base.threads)
    except Unavailable as error:
        log.warning("%s", error)
        return base


class CpuBackend:
    """`cpu_ops`, for a server that is about to load weights."""

    def __init__(self) -> None:
        self._library: Library | None = None

    def prepare(self, num_bytes: int) -> None:
        """Begin to take memory for the weights, on another core while torch is imported."""
        from blade_native.simd.library import Unavailable, load

        with suppress(Unavailable, OSError):
            self._library = load()
            self._library.regions.prepare(num_bytes, self._library.touch)

    def __call__(self, threads: int | None) -> Ops:
        ops = cpu_ops(threads, self._library)
        if self._library is not None:  # weights are loaded: what is kept of one's numbers is too small for the next
            keep_freed_memory(LARGE_MATRIX)
        return ops


def cuda_ops(threads: int | None) -> Ops:
    """Own kernels through CuPy; where they cannot be had, torch's, with a word on what that costs."""
    from blade_native.cuda import CudaOps, TorchCudaOps
    from blade_native.cuda.launch import Launcher, import_cupy

    base = TorchCudaOps()
    try:
        base.require_capability(*MIN_CAPABILITY)
        return CudaOps(base, Launcher(import_cupy(), base.device))
    except Exception as error:  # no CuPy, no headers, a compiler's or a driver's refusal: each has a class of its own
        log.warning("%s Serving on torch: quantised weights become dense, decoding is slower.", str(error).strip())
        return base


def paged_attention(ops: Ops) -> Attention:
    from blade_native.attention import PagedAttention
    from blade_native.simd.attention import SimdAttention
    from blade_native.simd.ops import SimdOps

    base = PagedAttention(ops.device)
    if isinstance(ops, SimdOps):
        return SimdAttention(base, ops.library, ops.threads)
    from blade_native.cuda import CudaOps  # not before: a start on a CPU should not wait for it

    if isinstance(ops, CudaOps):
        from blade_native.cuda.attention import CudaAttention
        from blade_native.cuda.attention_kernels import AttentionKernels

        return CudaAttention(base, AttentionKernels(ops.launcher), num_sms=ops.num_sms)
    return base


@hookimpl
def register_backends(register: Any) -> None:
    register("cpu", CpuBackend())
    register("cuda", cuda_ops)


@hookimpl
def register_attention(register: Any) -> None:
    register("paged", paged_attention)
