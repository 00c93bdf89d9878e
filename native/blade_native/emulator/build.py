"""Compile CUDA C++ with g++ against the emulator's headers into a shared library, cached by content."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from blade import ConfigError
from blade_native.cuda.launch import cache_folder

HEADERS = Path(__file__).parent / "include"
FLAGS = (
    "-std=gnu++17", "-g1", "-fPIC", "-shared", "-fvisibility=hidden", "-fno-gnu-unique", "-fno-strict-aliasing",
    "-ffp-contract=off", "-Wall", "-Wno-unknown-pragmas", "-Wno-unused",
)  # fmt: skip
SANITIZERS = {
    # without a runtime to preload: what is found becomes a trap, which traps.h reports
    "": ("-O2", "-fsanitize=alignment,bounds", "-fsanitize-undefined-trap-on-error"),
    "address": ("-O1", "-fsanitize=address"),
    "undefined": ("-O1", "-fsanitize=undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=undefined"),
    "thread": ("-O1", "-fsanitize=thread"),
}
ANCHOR = "emulator_info"  # the function that emulator_anchor() returns the address of
STATIC_IN_KERNEL = re.compile(r"^([0-9a-f]+) ([0-9a-f]+) [bBdDuV] _ZZ(?!N8emulator)", re.MULTILINE)


class CompileError(Exception):
    """g++ refused the source; the message holds its output."""


class Region(ctypes.Structure):
    """`Region` of emulator/launch.h."""

    _fields_ = (("address", ctypes.c_void_p), ("bytes", ctypes.c_size_t))


def include_folders() -> list[Path]:
    """NVIDIA's headers for the types (packages nvidia-cuda-runtime, nvidia-cuda-crt, and <nv/target> of cupy)."""
    site = Path(sysconfig.get_paths()["purelib"])
    folders = [site / "nvidia/cu13/include", site / "cupy/_core/include/cupy/_cccl/libcudacxx"]
    missing = [folder for folder in folders if not folder.is_dir()]
    if missing:
        raise ConfigError(f"{missing[0]} is missing.", "The emulator needs the packages of blade-llm[dev].")
    return folders


def compiler() -> str:
    """Raises ConfigError where this machine cannot run the emulator."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        raise ConfigError(f"The CUDA emulator switches stacks by hand and knows x86-64 only, not {platform.machine()}.")
    found = shutil.which(os.environ.get("CXX", "g++"))
    if found is None:
        raise ConfigError("The CUDA emulator needs a C++ compiler.", "Install g++ or name one in $CXX.")
    return found


def build(code: str, names: Sequence[str], options: Sequence[str], sanitize: str) -> Path:
    """The library of the named kernels. Raises CompileError, and ConfigError where this machine cannot."""
    kernels = (f"EMULATOR_KERNEL({i}, {json.dumps(name)}, {name})\n" for i, name in enumerate(names))
    body = code + '\n#line 1 "registrations"\n' + "".join(kernels)
    kept = [option for option in options if option.startswith(("-D", "-I"))]
    includes = [f"-I{HEADERS}", *(f"-isystem{folder}" for folder in include_folders())]
    command = [compiler(), *FLAGS, *SANITIZERS[sanitize], *kept, *includes, "-include", "cuda_emulator.h"]
    digest = hashlib.sha256(repr((body, command)).encode())
    for header in sorted(HEADERS.rglob("*.h")):
        digest.update(header.read_bytes())
    library = cache_folder("emulator") / f"{digest.hexdigest()[:32]}.so"
    if not library.exists():
        compile_into(library, command, body)
    return library


def compile_into(library: Path, command: list[str], body: str) -> None:
    """Put the library in place atomically: several processes may compile it at a time."""
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        text, built = Path(scratch, "kernels.cpp"), Path(scratch, "kernels.so")
        text.write_text(body, encoding="utf-8")
        done = subprocess.run([*command, "-o", str(built), str(text)], capture_output=True, text=True)
        if done.returncode:
            raise CompileError(done.stderr)
        os.replace(built, library)


class Library:
    """A compiled module in this process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.dll = ctypes.CDLL(str(path))
        text, pointer, size = ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t
        self.launch = self.dll.emulator_launch
        self.launch.restype = text
        self.launch.argtypes = [
            text, pointer, pointer, size, pointer, ctypes.c_uint, ctypes.c_double, ctypes.POINTER(Region), size
        ]  # fmt: skip
        self.dll.emulator_info.argtypes = [text, pointer, pointer, pointer]
        self.dll.emulator_anchor.restype = pointer
        found = list(self._static_shared())
        self.regions = (Region * len(found))(*found)

    def _static_shared(self) -> Iterator[Region]:
        """The __shared__ variables of the kernels: in C++ they are variables static in a function."""
        symbols = subprocess.run(["nm", "-S", str(self.path)], capture_output=True, text=True, check=True).stdout
        anchor = re.search(rf"^([0-9a-f]+) [0-9a-f]+ \w {ANCHOR}$", symbols, re.MULTILINE)
        if anchor is None:
            raise RuntimeError(f"{self.path} has no {ANCHOR}")
        base = self.dll.emulator_anchor() - int(anchor[1], 16)
        for address, size in STATIC_IN_KERNEL.findall(symbols):
            yield Region(base + int(address, 16), int(size, 16))

    def parameters(self, name: str) -> list[tuple[int, str]] | None:
        """Size and kind of each of the kernel's parameters; None when there is no such kernel."""
        count, sizes, kinds = ctypes.c_int(), (ctypes.c_int * 64)(), ctypes.create_string_buffer(64)
        if self.dll.emulator_info(name.encode(), ctypes.byref(count), sizes, kinds):
            return None
        return list(zip(sizes[: count.value], kinds.raw[: count.value].decode(), strict=True))


def with_source_lines(report: str) -> str:
    """Replace {library+offset} in a report by the place in the source, where addr2line is there to tell."""

    def locate(match: re.Match[str]) -> str:
        command = ["addr2line", "-e", match[1], "-i", "-s", match[2]]
        try:
            lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")
        except (OSError, subprocess.CalledProcessError):
            return match[0]
        return " < ".join(line.partition(" (")[0] for line in lines if line)

    return re.sub(r"\{([^{}+]+)\+(0x[0-9a-f]+)\}", locate, report)
