"""CUDA through torch's own kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from blade import ConfigError
from blade_native.reference import TorchOps

if TYPE_CHECKING:
    from torch import Tensor


class TorchCudaOps(TorchOps):
    """contracts.Ops on the current CUDA device."""

    name = "cuda, torch kernels"

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise ConfigError("torch finds no CUDA device.", "Use --device cpu, or install a CUDA build of torch.")
        super().__init__(torch.device("cuda", torch.cuda.current_device()))

    def default_dtype(self) -> torch.dtype:
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16

    def available_memory(self) -> int:
        torch.cuda.empty_cache()  # what loading left behind is free as well
        free, _ = torch.cuda.mem_get_info(self.device)
        return free

    def to_device(self, x: Tensor) -> Tensor:
        return to_cuda(x, self.device)

    def require_capability(self, major: int, minor: int) -> None:
        """Raises ConfigError for an older device."""
        found = torch.cuda.get_device_capability(self.device)
        if found < (major, minor):
            raise ConfigError(
                f"The device has compute capability {found[0]}.{found[1]}, our kernels need {major}.{minor}."
            )


MAX_PINNED_BYTES = 4 << 20  # of what a step brings; weights would take long to pin


def to_cuda(x: Tensor, device: torch.device) -> Tensor:
    """A copy that neither waits for the device nor is waited for: from pinned memory, which CUDA asks for."""
    if x.is_cpu and device.type == "cuda" and x.nbytes <= MAX_PINNED_BYTES:
        x = x.pin_memory()
    return x.to(device, non_blocking=True)
