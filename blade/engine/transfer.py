"""Between host and device without waiting: what CUDA copies by itself has to lie in pinned memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def send(x: Tensor, device: torch.device) -> Tensor:
    """A copy of x on the device, for what is launched from now on; x itself on a CPU."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


class Later:
    """A tensor's copy on the host, begun now, so that what the device does afterwards is not waited for."""

    def __init__(self, x: Tensor) -> None:
        self._copy = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)
        self._copy.copy_(x, non_blocking=x.is_cuda)
        self._event = torch.cuda.Event() if x.is_cuda else None  # type: ignore[no-untyped-call]
        if self._event is not None:
            self._event.record()

    def tolist(self) -> list[list[float]]:
        if self._event is not None:
            self._event.synchronize()
        found: list[list[float]] = self._copy.tolist()
        return found
