"""CUDA: own kernels through CuPy where they are worth it, torch's for the rest."""

from __future__ import annotations

from blade_native.cuda.ops import CudaOps
from blade_native.cuda.torch_ops import TorchCudaOps

__all__ = ["CudaOps", "TorchCudaOps"]
