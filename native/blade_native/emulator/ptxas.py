"""Compile with NVRTC for any architecture, exactly as CuPy would on a device of it, and read what ptxas says."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from blade_native.cuda.launch import OPTIONS, cache_folder, import_cupy
from blade_native.emulator.declared import Limits
from blade_native.emulator.devices import Device

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
