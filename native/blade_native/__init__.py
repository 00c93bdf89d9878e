"""The devices blade runs on: their op sets (``--device``) and the paged attention (``--attention``) they share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from blade import hookimpl

if TYPE_CHECKING:
    from blade.contracts import Attention, Ops


def cpu_ops(threads: int | None) -> Ops:
    from blade_native.cpu import CpuOps

    return CpuOps(threads)


def cuda_ops(threads: int | None) -> Ops:
    from blade_native.cuda import CudaOps

    return CudaOps()


def paged_attention(ops: Ops) -> Attention:
    from blade_native.attention import PagedAttention

    return PagedAttention(ops.device)


@hookimpl
def register_backends(register: Any) -> None:
    register("cpu", cpu_ops)
    register("cuda", cuda_ops)


@hookimpl
def register_attention(register: Any) -> None:
    register("paged", paged_attention)
