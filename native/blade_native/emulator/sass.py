"""Static rooflines from machine code: how fast a kernel's main loop can stream, were memory infinitely fast.

The main loop is the innermost one that loads the most bytes from global memory: look at the listing before trusting a
figure. An SM's cycles per iteration of one warp are the largest of what each pipe needs (four schedulers
issue one instruction each a cycle; integer and logic units do 64 lanes a cycle, special functions and conversions 16,
shuffles 32, shared memory 128 bytes; float and tensor units by device). The limit is bytes per iteration over those
cycles: an upper bound, as no pipe is ever full. A kernel that is to reach the memory's rate wants 1.5 to 2 times that.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from blade_native.emulator.devices import Device

FUNCTION = re.compile(r"\s*\.text\.(\S+):")
LABEL = re.compile(r"\s*\.?(L_x_\d+):")
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?);")
ALU = ("IADD3", "LOP3", "SHF", "PRMT", "ISETP", "FSETP", "SEL", "FSEL", "FMNMX", "IMNMX", "LEA", "PLOP3", "I2FP")
FMA = ("FFMA", "FMUL", "FADD", "IMAD")
QUARTER_RATE = ("MUFU", "I2F", "F2I", "F2F", "POPC", "FLO")
LATENCY_NS = 700  # of a load from global memory, by which bytes in flight are judged


@dataclass(frozen=True)
class Instruction:
    """`opcode` with its modifiers, "LDG.E.128"; a label has the opcode "" and its name as operands."""

    opcode: str
    operands: str

    def bytes_of(self, *names: str) -> int:
        """Bytes a lane moves, 0 for other instructions than `names`."""
        parts = self.opcode.split(".")
        if parts[0] not in names:
            return 0
        if parts[0] == "LDSM":
            return 4 * int(parts[-1]) if parts[-1].isdigit() else 4
        sizes = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
        return next((sizes[part] for part in parts if part in sizes), 4)


@dataclass(frozen=True)
class Loop:
    """The main loop; per iteration of one warp."""

    body: Sequence[Instruction]
    global_bytes: int

    def cycles(self, device: Device) -> dict[str, float]:
        """An SM's cycles for one warp's iteration, by the pipe that needs them."""
        count = Counter(one.opcode.split(".")[0] for one in self.body)
        shared = sum(one.bytes_of("LDS", "STS", "LDSM") for one in self.body)
        tensor = sum(0.5 if ".1688" in one.opcode else 1 for one in self.body if one.opcode.startswith("HMMA"))
        return {
            "issue": len(self.body) / 4,
            "ALU": sum(count[name] for name in ALU) / 2,
            "FMA": sum(count[name] for name in FMA) / device.fma_warps,
            "MUFU": sum(count[name] for name in QUARTER_RATE) * 2,
            "SHFL": count["SHFL"],
            "shared": shared * 32 / 128,
            "tensor": tensor * device.mma_cycles,
        }

    def limit(self, device: Device) -> tuple[float, str]:
        """GB/s of the whole device, and the pipe that sets them."""
        pipe, cycles = max(self.cycles(device).items(), key=lambda item: item[1])
        return self.global_bytes / cycles * device.clock * device.num_sms, pipe

    def describe(self, device: Device, warps: int) -> str:
        """A line for people; `warps` is how many an SM holds."""
        limit, pipe = self.limit(device)
        needed = device.bandwidth * LATENCY_NS / device.num_sms / 1024
        common = Counter(one.opcode.split(".")[0] for one in self.body).most_common(8)
        return (
            f"loop: {len(self.body)} instructions for {self.global_bytes} bytes; {pipe} limit {limit:.0f} GB/s = "
            f"{limit / device.bandwidth:.2f} of memory's {device.bandwidth:.0f}; {warps} warps load "
            f"{warps * self.global_bytes / 1024:.0f} KiB an iteration ({needed:.0f} in flight fill {LATENCY_NS} ns); "
            + " ".join(f"{name}:{n}" for name, n in common)
        )


def nvdisasm() -> Path | None:
    """The disassembler of package nvidia-cuda-nvdisasm or of a toolkit; None where there is none."""
    packaged = Path(sysconfig.get_paths()["purelib"], "nvidia/cu13/bin/nvdisasm")
    found = packaged if packaged.exists() else shutil.which("nvdisasm")
    return Path(found) if found else None


def disassemble(cubin: bytes) -> dict[str, list[Instruction]]:
    """Instructions and labels by mangled function name; empty where there is no nvdisasm."""
    tool = nvdisasm()
    if tool is None:
        return {}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([str(tool), "-c", file.name], capture_output=True, text=True, check=True).stdout
    return parse(text)


def parse(listing: str) -> dict[str, list[Instruction]]:
    functions: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    for line in listing.splitlines():
        if match := FUNCTION.match(line):
            current = functions.setdefault(match[1], [])
        elif match := LABEL.match(line):
            current.append(Instruction("", match[1]))
        elif match := INSTRUCTION.search(line):
            current.append(Instruction(match[1], match[2]))
    return functions


def main_loop(instructions: Sequence[Instruction]) -> Loop | None:
    """Of the innermost loops that load from global memory the one that loads the most; None where there is none."""
    loading = [(start, end, size) for start, end in loops(instructions) if (size := loaded(instructions[start:end]))]
    innermost = [
        (size, start, end)
        for start, end, size in loading
        if not any(start <= s and e <= end and (s, e) != (start, end) for s, e, _ in loading)
    ]
    if not innermost:
        return None
    size, start, end = max(innermost)
    return Loop([one for one in instructions[start:end] if one.opcode], size)


def loops(instructions: Sequence[Instruction]) -> Iterator[tuple[int, int]]:
    """Begin and end of what lies between a label and a later branch to it."""
    labels: dict[str, int] = {}
    for i, one in enumerate(instructions):
        if not one.opcode:
            labels[one.operands] = i
        target = re.search(r"L_x_\d+", one.operands) if one.opcode.startswith("BRA") else None
        if target and target[0] in labels:
            yield labels[target[0]], i + 1


def loaded(instructions: Sequence[Instruction]) -> int:
    """Bytes that a warp loads from global memory."""
    return 32 * sum(one.bytes_of("LDG", "LDGSTS") for one in instructions)
