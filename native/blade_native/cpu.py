"""CPU: oneDNN linears over weights packed once.

`F.linear` brings the weight into oneDNN's layout anew on every call. Packed at load, one call takes 0.4 to 0.7 of the
time in bfloat16 and 0.2 to 0.6 in float32 (Qwen2.5-0.5B's shapes, 1 to 64 rows).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from blade import ConfigError
from blade_native.host import available_cores, keep_freed_memory, release_freed_memory
from blade_native.reference import TorchOps

if TYPE_CHECKING:
    from torch import Tensor

    from blade.contracts import Linear

NUM_ROWS_HINT = 16  # oneDNN's layout depends on the rows it is told to expect; this one is good from 1 to 1024


class PackedLinear:
    """y = x W^T + b over a weight in oneDNN's own layout."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), NUM_ROWS_HINT)
        self.bias = bias

    def __call__(self, x: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return y.to(out_dtype or x.dtype)


class CpuOps(TorchOps):
    """contracts.Ops on this machine's CPU. `threads`: None for all cores this process may use."""

    def __init__(self, threads: int | None = None) -> None:
        super().__init__("cpu")
        if threads is not None and threads < 1:
            raise ConfigError(f"The number of threads must be at least 1, not {threads}.")
        keep_freed_memory()
        self.threads = threads or min(available_cores(), torch.get_num_threads())
        torch.set_num_threads(self.threads)
        self.name = f"cpu, {self.threads} threads, oneDNN"

    def default_dtype(self) -> torch.dtype:
        """bfloat16 where oneDNN has kernels for it (AVX-512 and up); elsewhere it would be emulated, slowly."""
        return torch.bfloat16 if can_pack(torch.bfloat16) else torch.float32

    def available_memory(self) -> int:
        release_freed_memory()  # what loading left behind is free as well
        return super().available_memory()

    def linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        return PackedLinear(weight, bias) if can_pack(weight.dtype) else super().linear(weight, bias)


def can_pack(dtype: torch.dtype) -> bool:
    """Whether oneDNN has linears of this dtype for this CPU."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32
