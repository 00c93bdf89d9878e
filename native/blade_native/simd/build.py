"""Compile the C++ sources into one shared library per instruction set: ``python -m blade_native.simd.build``.

By default for the best instruction set that this machine has, and for any machine (portable). $BLADE_CPU_LEVELS names
others, separated by commas, or all: for packages that are to run elsewhere.

Standard library only, because the package's build hook runs it before any dependency is there.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).parent.parent / "cpu"
LIBRARIES = SOURCES / "lib"

X86_LEVELS = {
    "amx": ["-march=x86-64-v4", "-mavx512vnni", "-mamx-tile", "-mamx-int8", "-mamx-bf16"],
    "avx512bf16": ["-march=x86-64-v4", "-mavx512vnni", "-mavx512bf16"],
    "avx512vnni": ["-march=x86-64-v4", "-mavx512vnni"],
    "avx512": ["-march=x86-64-v4"],
    "avx2": ["-march=x86-64-v3"],
    "portable": [],
}
# Never -ffast-math: linked into a library it makes the whole process flush subnormals to zero.
TRIALS = {"amx": 'void trial() { asm volatile("tilerelease"); }'}  # what the assembler has to know, too
FLAGS = [
    "-std=c++17", "-O3", "-fPIC", "-pthread", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-w",
    "-fno-strict-aliasing",  # packed bytes are read as words of several kinds
]  # fmt: skip


class CompileError(Exception):
    """The compiler failed; the message holds its output."""


def levels() -> dict[str, list[str]]:
    """Instruction-set levels of this architecture with their compiler flags, the newest first."""
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return X86_LEVELS if is_x86 else {"portable": []}


def compiler() -> str | None:
    """$CXX or g++; None where there is none."""
    return shutil.which(os.environ.get("CXX", "g++"))


def library_path(level: str) -> Path:
    return LIBRARIES / f"blade_cpu_{level}.so"


def source_hash() -> str:
    """Names the sources and flags a library was built from; a library that carries another one is stale."""
    digest = hashlib.sha256(repr((FLAGS, levels())).encode())
    for path in sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def is_current(level: str) -> bool:
    """Whether the level's library is there and was built from the sources as they are."""
    path = library_path(level)
    return path.exists() and source_hash().encode() in path.read_bytes()


def wanted_levels(cxx: str, environ: Mapping[str, str] = os.environ) -> list[str]:
    """The levels to compile, the newest first. Raises CompileError for one that there is not."""
    named = environ.get("BLADE_CPU_LEVELS")
    if not named:
        return list(dict.fromkeys([best_level(cxx), "portable"]))
    if named == "all":
        return [level for level in levels() if can_compile(cxx, level)]
    wanted = {*named.split(","), "portable"}
    if unknown := wanted - levels().keys():
        raise CompileError(f"$BLADE_CPU_LEVELS has {min(unknown)!r}; there are all, {', '.join(levels())}")
    return [level for level in levels() if level in wanted]


def best_level(cxx: str) -> str:
    """Of those that this machine can run and the compiler knows."""
    return next(level for level in runnable_levels(cxx) if can_compile(cxx, level))


def runnable_levels(cxx: str) -> list[str]:
    """Levels that this machine can run, the fastest first."""
    if len(levels()) == 1:
        return list(levels())
    with tempfile.TemporaryDirectory() as scratch:
        probe = str(Path(scratch, "level.so"))
        run([cxx, *FLAGS, '-DBLADE_SOURCE_HASH=""', "-shared", str(SOURCES / "level.cpp"), "-o", probe])
        machine = ctypes.CDLL(probe)
    names, runnable = list(reversed(levels())), range(machine.blade_machine_level() + 1)
    return [names[i] for i in sorted(runnable, key=machine.blade_level_rank, reverse=True)]


def can_compile(cxx: str, level: str) -> bool:
    """Whether the compiler and its assembler know the level: GCC knows all of them from version 11 on."""
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch, "trial.cpp")
        source.write_text(TRIALS.get(level, ""))
        try:
            run([cxx, *FLAGS, *levels()[level], "-c", str(source), "-o", str(source.with_suffix(".o"))])
        except CompileError:
            return False
    return True


def build(cxx: str) -> list[Path]:
    """Compile the wanted levels, as many files at a time as there are CPUs, and put the libraries in place atomically.
    Does nothing when they are current. Raises CompileError."""
    wanted = wanted_levels(cxx)
    if not all(is_current(level) for level in wanted):
        compile_levels(cxx, {level: levels()[level] for level in wanted})
    return [library_path(level) for level in wanted]


def compile_levels(cxx: str, wanted: Mapping[str, list[str]]) -> None:
    """Libraries by name, with the flags of each."""
    define = f'-DBLADE_SOURCE_HASH="{source_hash()}"'
    sources = sorted(SOURCES.glob("*.cpp"), key=lambda path: -path.stat().st_size)
    LIBRARIES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=LIBRARIES) as scratch, ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = {level: [Path(scratch, f"{level}-{source.stem}.o") for source in sources] for level in wanted}
        compiles = [
            [cxx, *FLAGS, *flags, define, "-c", str(source), "-o", str(target)]
            for level, flags in wanted.items()
            for source, target in zip(sources, objects[level], strict=True)
        ]
        list(pool.map(run, compiles))
        for level, parts in objects.items():
            linked = Path(scratch, level)
            run([cxx, "-shared", "-pthread", *map(str, parts), "-o", str(linked)])
            os.replace(linked, library_path(level))


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise CompileError(f"{' '.join(command)}\n{done.stderr}")


def main() -> None:
    cxx = compiler()
    if cxx is None:
        sys.exit("no C++ compiler: install g++ or name one in $CXX")
    print(*build(cxx), sep="\n")


if __name__ == "__main__":
    main()
