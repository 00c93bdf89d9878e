"""Compile CUDA C++ with g++ against the emulator's headers into a shared library, cached by content."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path

from blade import ConfigError
from blade_native.cuda.launch import cache_folder

HEADERS = Path(__file__).parent / "include"
FLAGS = (
    "-std=gnu++17", "-g", "-fPIC", "-shared", "-fvisibility=hidden", "-fno-gnu-unique", "-fno-strict-aliasing",
    "-ffp-contract=off", "-Wall", "-Wno-unknown-pragmas", "-Wno-unused", "-Wno-attributes",
    "-Wno-class-memaccess", "-Wno-dangling-pointer", "-Wno-misleading-indentation",
)  # fmt: skip
SANITIZERS = {
    "": ("-O2",),
    "address": ("-O1", "-fsanitize=address"),
    "undefined": ("-O1", "-fsanitize=undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=undefined"),
    "thread": ("-O1", "-fsanitize=thread"),
}


class CompileError(Exception):
    """g++ refused the source; the message holds its output."""


def include_folders() -> list[Path]:
    """NVIDIA's headers for the types (packages nvidia-cuda-runtime, nvidia-cuda-crt, and <nv/target> of cupy)."""
    site = Path(sysconfig.get_paths()["purelib"])
    folders = [site / "nvidia/cu13/include", site / "cupy/_core/include/cupy/_cccl/libcudacxx"]
    missing = [folder for folder in folders if not folder.is_dir()]
    if missing:
        raise ConfigError(f"{missing[0]} is missing.", "The emulator needs the packages of blade-llm[dev].")
    return folders


def build(code: str, names: Sequence[str], options: Sequence[str], sanitize: str) -> Path:
    """The library of the named kernels. Raises CompileError, and ConfigError where this machine cannot."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        raise ConfigError(f"The CUDA emulator switches stacks by hand and knows x86-64 only, not {platform.machine()}.")
    cxx = shutil.which(os.environ.get("CXX", "g++"))
    if cxx is None:
        raise ConfigError("The CUDA emulator needs a C++ compiler.", "Install g++ or name one in $CXX.")
    body = code + '\n#line 1 "registrations"\n' + "".join(f"EMULATOR_KERNEL({i}, {n})\n" for i, n in enumerate(names))
    kept = [option for option in options if option.startswith(("-D", "-I"))]
    command = [cxx, *FLAGS, *SANITIZERS[sanitize], *kept, *(f"-I{folder}" for folder in include_folders())]
    digest = hashlib.sha256(repr((body, command)).encode())
    for header in sorted(HEADERS.glob("*.h")):
        digest.update(header.read_bytes())
    library = cache_folder("emulator") / f"{digest.hexdigest()[:32]}.so"
    if not library.exists():
        compile_into(library, [*command, f"-I{HEADERS}", "-include", "cuda_emulator.h"], body)
    return library


def compile_into(library: Path, command: list[str], body: str) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        text = Path(scratch, "kernels.cpp")
        text.write_text(body, encoding="utf-8")
        built = Path(scratch, "kernels.so")
        done = subprocess.run([*command, "-o", str(built), str(text)], capture_output=True, text=True)
        if done.returncode:
            raise CompileError(done.stderr)
        os.replace(built, library)


def load(library: Path) -> ctypes.CDLL:
    dll = ctypes.CDLL(str(library))
    text, pointer, size = ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t
    dll.emulator_launch.argtypes = [text, pointer, pointer, size, pointer, ctypes.c_uint, text, size]
    dll.emulator_info.argtypes = [text, pointer, pointer, pointer]
    return dll
