"""Run CUDA kernels on the CPU: a stand-in for cupy that compiles the very same source for this machine.

launcher = emulated()                                   # takes the place of Launcher(import_cupy(), device)
module = launcher.load(path, ["add<float>"])
module.kernel("add<float>")((1,), (32,), out=out, x=x)  # on CPU tensors
"""

from __future__ import annotations

import os

import torch

from blade_native.cuda.launch import Launcher
from blade_native.emulator.cupy_double import CupyDouble

__all__ = ["CupyDouble", "bridged", "emulated"]


def bridged() -> Launcher:
    """A Launcher that takes CPU tensors as `emulated`'s does, and runs the kernels on a CUDA device: the same tests, of
    what the device makes of the kernels. Raises ConfigError without CuPy."""
    from blade_native.emulator.bridge import BridgedLauncher

    return BridgedLauncher()


def emulated(sanitize: str | None = None, seed: int | None = None) -> Launcher:
    """A Launcher on the CPU. `sanitize` is "", address, undefined or thread (default $BLADE_EMULATOR_SANITIZE), and
    needs its runtime preloaded; `seed` permutes the order of blocks and threads (default $BLADE_EMULATOR_SEED; 0 keeps
    it)."""
    if sanitize is None:
        sanitize = os.environ.get("BLADE_EMULATOR_SANITIZE", "")
    if seed is None:
        seed = int(os.environ.get("BLADE_EMULATOR_SEED", "0"))
    return Launcher(CupyDouble(sanitize, seed), torch.device("cpu"))
