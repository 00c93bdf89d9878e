"""Compile the CUDA sources for every architecture as CuPy would, without a device, and hold them to their limits.

    python -m blade_native.emulator.nvrtc [--arch sm_90 ...] [--sass] [--quick] [FILE ...]

prints per kernel and architecture: registers a thread, spilled bytes, stack, static shared memory, blocks and warps an
SM; with --sass what the instructions of its main loop allow, see sass.py. The status is 1 where a limit is exceeded.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import re
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from blade_native.cuda.launch import OPTIONS, SOURCES, cache_folder, import_cupy
from blade_native.cuda.source import inline
from blade_native.emulator import sass
from blade_native.emulator.declared import Check, Limits, checks
from blade_native.emulator.devices import DEVICES, Device

FUNCTION = re.compile(r"Function properties for '?([\w$]+)'?")
STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")


@dataclass(frozen=True)
class Usage:
    """What ptxas reports of a kernel: registers a thread; spill stores and loads, stack and static shared memory in
    bytes."""

    registers: int
    spills: int
    stack: int
    shared: int

    def violations(self, limits: Limits, device: Device) -> list[str]:
        """What exceeds the limits, in words."""
        blocks = device.blocks(limits.threads, self.registers, self.shared + limits.shared)
        found = []
        if self.spills:
            found.append(f"spills {self.spills} bytes")
        if self.stack > limits.stack:
            found.append(f"{self.stack} bytes of local memory, not {limits.stack}")
        if self.registers > limits.registers:
            found.append(f"{self.registers} registers, not {limits.registers}")
        if blocks < limits.blocks:
            found.append(f"{blocks} blocks on an SM, not {limits.blocks}")
        return found


@dataclass(frozen=True)
class Compiled:
    """A source compiled for one architecture: machine code, ptxas' figures, and the mangled name by expression."""

    cubin: bytes
    usage: dict[str, Usage]
    mangled: dict[str, str]


def compile_source(text: str, expressions: Sequence[str], arch: str) -> Compiled:
    """Compile with the options that RawModule would use on a device of `arch`. The results are cached by content."""
    key = hashlib.sha256(repr((text, tuple(expressions), arch, OPTIONS, import_cupy().__version__)).encode())
    stored = cache_folder("nvrtc") / key.hexdigest()[:32]
    if not stored.exists():
        cubin, mangled, log = _compile(text, expressions, arch)
        scratch = stored.with_suffix(f".{os.getpid()}")
        scratch.write_bytes(json.dumps({"mangled": mangled, "log": log}).encode() + b"\n" + cubin)
        os.replace(scratch, stored)
    head, _, cubin = stored.read_bytes().partition(b"\n")
    facts = json.loads(head)
    return Compiled(cubin, parse_log(facts["log"]), facts["mangled"])


def _compile(text: str, expressions: Sequence[str], arch: str) -> tuple[bytes, dict[str, str], str]:
    cupy = import_cupy()
    from cupy.cuda import compiler

    log = io.StringIO()
    options = cupy._core.core.assemble_cupy_compiler_options(OPTIONS)
    options += ("-ftz=true", f"-arch={arch}", "--device-as-default-execution-space", "--ptxas-options=-v")
    program = compiler._NVRTCProgram(text, "kernels.cu", (), (), name_expressions=tuple(expressions), method="cubin")
    cubin, mangled = program.compile(options, log)
    return cubin + b"\0", mangled, log.getvalue()  # CuPy drops the last byte, which nvdisasm misses


def load_nvrtc() -> None:
    """Compile nothing, once: NVRTC loads its second library at its first compilation, and not safely from two
    threads."""
    from cupy.cuda import compiler

    compiler._NVRTCProgram("", "empty.cu", method="ptx").compile(("-arch=compute_80",))


def parse_log(log: str) -> dict[str, Usage]:
    """ptxas -v's figures by mangled name."""
    found, name, stack, spills = {}, "", 0, 0
    for line in log.splitlines():
        if match := FUNCTION.search(line):
            name = match[1]
        if match := STACK.search(line):
            stack, spills = int(match[1]), int(match[2]) + int(match[3])
        if match := USED.search(line):
            shared = SHARED.search(line)
            found[name] = Usage(int(match[1]), spills, stack, int(shared[1]) if shared else 0)
    return found


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


HEAD = f"{'arch':7} {'kernel':56} regs spills  stack  shared blocks  warps"


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
