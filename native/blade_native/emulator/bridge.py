"""The way back from the emulator: tests that were written for CPU tensors run their kernels on a CUDA device.

Each launch takes the memory its tensors lie in to the device, runs there, waits, and brings all of it back, bit for
bit: slow, and the same to whoever looks at the tensors.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blade_native.cuda import source
from blade_native.cuda.arguments import Arguments
from blade_native.cuda.launch import SOURCES, Dims, Kernel, Launcher, Module, import_cupy


@dataclass(frozen=True)
class BridgedLaunch:
    """One launch, its tensors on the CPU."""

    kernel: BridgedKernel
    grid: Dims
    block: Dims
    values: dict[str, Any]

    def run(self) -> None:
        kernel = self.kernel.on_device
        trip = RoundTrip(kernel.device)
        kernel(self.grid, self.block, **{name: trip.there(value) for name, value in self.values.items()})
        torch.cuda.synchronize()
        trip.back()


class RoundTrip:
    """Copies of the memory of tensors, by its address: tensors that share it share the copy."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}

    def there(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        storage = value.untyped_storage()
        if storage.data_ptr() not in self._copies:
            here = torch.empty(0, dtype=torch.uint8).set_(storage)
            self._copies[storage.data_ptr()] = here, here.to(self._device)
        copy = self._copies[storage.data_ptr()][1].untyped_storage()
        empty = torch.empty(0, dtype=value.dtype, device=self._device)
        return empty.set_(copy, value.storage_offset(), value.size(), value.stride())

    def back(self) -> None:
        for here, copy in self._copies.values():
            here.copy_(copy)


class Launches:
    """`launches` and `capture` of CupyDouble, which tests look at."""

    def __init__(self) -> None:
        self.launches: list[BridgedLaunch] = []
        self.capture: list[BridgedLaunch] | None = None

    def add(self, launch: BridgedLaunch) -> None:
        self.launches.append(launch)
        if self.capture is not None:
            self.capture.append(launch)
        else:
            launch.run()


class BridgedKernel:
    """Checks the arguments as on the CPU, and launches on the device."""

    def __init__(self, expression: str, kernel: Kernel, arguments: Arguments, launches: Launches) -> None:
        self.name, self.shared_bytes, self.on_device = expression, kernel.shared_bytes, kernel
        self._arguments, self._launches = arguments, launches

    def __call__(self, grid: Dims, block: Dims, /, **values: Any) -> None:
        self._arguments.pack(values)
        self._launches.add(BridgedLaunch(self, grid, block, values))


class BridgedModule(Module):
    def __init__(self, module: Module, kernels: dict[str, source.Signature], launches: Launches) -> None:
        self._module, self._declared, self._launches = module, kernels, launches

    def kernel(self, expression: str, shared_bytes: int = 0) -> Any:
        arguments = Arguments(self._declared, expression, torch.device("cpu"))
        return BridgedKernel(expression, self._module.kernel(expression, shared_bytes), arguments, self._launches)


class BridgedLauncher(Launcher):
    """A Launcher on the CPU, as `emulated` makes one, whose kernels run on torch's current CUDA device."""

    def __init__(self) -> None:
        super().__init__(Launches(), torch.device("cpu"))
        self._on_device = Launcher(import_cupy(), torch.device("cuda", torch.cuda.current_device()))

    def load(self, path: Path | str, expressions: Iterable[str], options: Iterable[str] = ()) -> Module:
        module = self._on_device.load(path, expressions, options)
        return BridgedModule(module, source.kernels(source.inline(SOURCES / path)), self.cupy)
