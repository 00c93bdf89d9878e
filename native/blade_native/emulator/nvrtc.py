"""Compile the CUDA sources for every architecture as CuPy would, without a device, and hold them to their limits.

    python -m blade_native.emulator.nvrtc [--arch sm_90 ...] [--sass] [--quick] [FILE ...]

prints per kernel and architecture: registers a thread, spilled bytes, stack, static shared memory, blocks and warps an
SM; with --sass what the instructions of its main loop allow, see sass.py. The status is 1 where a limit is exceeded.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from blade_native.cuda.launch import SOURCES
from blade_native.cuda.source import inline
from blade_native.emulator import sass
from blade_native.emulator.declared import Check, Limits, checks
from blade_native.emulator.devices import DEVICES, Device
from blade_native.emulator.ptxas import Usage, compile_source, load_nvrtc

HEAD = f"{'arch':7} {'kernel':56} regs spills  stack  shared blocks  warps"


@dataclass(frozen=True)
class Row:
    """One kernel on one architecture."""

    expression: str
    device: Device
    limits: Limits
    usage: Usage
    instructions: list[sass.Instruction]

    @property
    def shared(self) -> int:
        return self.usage.shared + self.limits.shared

    @property
    def warps(self) -> int:
        """Warps that an SM holds at a time."""
        return self.device.blocks(self.limits.threads, self.usage.registers, self.shared) * -(
            -self.limits.threads // 32
        )

    def violations(self) -> list[str]:
        return self.usage.violations(self.limits, self.device)

    def __str__(self) -> str:
        usage, limits = self.usage, self.limits
        blocks = self.device.blocks(limits.threads, usage.registers, self.shared)
        return (
            f"{self.device.arch:7} {self.expression:56} {usage.registers:4} {usage.spills:6} {usage.stack:6} "
            f"{self.shared:7} {blocks:6} {self.warps:6}"
        )


def check(path: Path, archs: Iterable[str], quick: bool = False, with_sass: bool = False) -> list[Row]:
    """Compile what a source declares; `quick` takes the first instantiation of each declaration. Rows by arch."""
    text = inline(path)
    load_nvrtc()
    declared = [one for one in checks(text) if one.first or not quick]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # NVRTC runs outside of the interpreter's lock
        return [row for rows in pool.map(lambda arch: _check(text, declared, arch, with_sass), archs) for row in rows]


def _check(text: str, declared: Sequence[Check], arch: str, with_sass: bool) -> list[Row]:
    used = {one.expression: limits for one in declared if (limits := one.on(arch)) is not None}
    if not used:
        return []
    compiled = compile_source(text, list(used), arch)
    functions = sass.disassemble(compiled.cubin) if with_sass else {}
    return [
        Row(
            expression,
            DEVICES[arch],
            limits,
            compiled.usage[compiled.mangled[expression]],
            functions.get(compiled.mangled[expression], []),
        )
        for expression, limits in used.items()
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m blade_native.emulator.nvrtc", description=__doc__)
    parser.add_argument("files", nargs="*", type=Path, default=sorted(SOURCES.glob("*.cu")))
    parser.add_argument("--arch", action="append", choices=DEVICES, help="all where none is named")
    parser.add_argument("--sass", action="store_true", help="what the main loop's instructions allow")
    parser.add_argument("--quick", action="store_true", help="the first instantiation of each declaration")
    given = parser.parse_args(arguments)
    failures = 0
    for path in given.files:
        print(f"\n{path.name}\n{HEAD}")
        for row in check(path, given.arch or DEVICES, given.quick, given.sass):
            print(row)
            for violation in row.violations():
                failures += 1
                print(f"        EXCEEDED: {violation}")
            loop = sass.main_loop(row.instructions)
            if loop is not None:
                print(f"        {loop.describe(row.device, row.warps)}")
    print(f"\n{failures or 'no'} limits exceeded")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
