"""A stand-in for CUDA graphs on the CPU: what a step launches, torch's ops and our kernels, is taped and run again on
the same memory. As under capture, kernels do not run while they are taped, and what would wait for the device is
refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from blade_native.cuda.launch import Launcher

ALLOCATIONS = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided")
WAITS = ("_local_scalar_dense", "nonzero", "equal", "lift_fresh", "masked_select", "is_nonzero")


class Op:
    """One torch op with its arguments, which it keeps alive as a graph's memory pool does."""

    def __init__(self, function: Any, args: Any, kwargs: Any, out: Any) -> None:
        self.function, self.args, self.kwargs, self.out = function, args, kwargs, out

    def run(self) -> None:
        if self.function.overloadpacket.__name__ in ALLOCATIONS:
            return
        for old, new in zip(tree_leaves(self.out), tree_leaves(self.function(*self.args, **self.kwargs)), strict=True):
            if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                old.copy_(new)


class Taping(TorchDispatchMode):
    def __init__(self, tape: list[Any]) -> None:
        super().__init__()
        self.tape = tape

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in WAITS:
            raise RuntimeError(f"{func}: operation not permitted when stream is capturing")
        out = func(*args, **(kwargs or {}))
        self.tape.append(Op(func, args, kwargs or {}, out))
        return out


class TapeRecorder:
    """graphs.Recorder. `replays` counts them."""

    def __init__(self, launcher: Launcher) -> None:
        self.launcher = launcher
        self.replays = 0
        self.tapes: list[list[Any]] = []

    def record(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        run()
        tape: list[Any] = []
        self.launcher.cupy.capture = tape
        try:
            with Taping(tape):
                out = run()
        finally:
            self.launcher.cupy.capture = None
        self.tapes.append(tape)

        def replay() -> None:
            self.replays += 1
            for entry in tape:
                entry.run()

        return replay, out
