"""The AVX-512 and AMX kernels for tests on a machine without: ``python -m blade_native.simd.emulated [level ...]``.

The same sources, with plain C++ in place of the tile instructions (cpu/emulated/amx.h) and, where the machine lacks
AVX-512, SIMDe in place of its intrinsics (cpu/emulated/avx512.h), compiled for AVX2. That needs SIMDe's headers,
Debian's libsimde-dev. What the compiler would make of real AVX-512 is not tested by it, nor is the inline assembly.
"""

from __future__ import annotations

import sys

from blade_native.simd import build

AMX = ["-include", str(build.SOURCES / "emulated" / "amx.h")]
AVX512 = ["-march=x86-64-v3", "-include", str(build.SOURCES / "emulated" / "avx512.h")]
OPTIMIZATION = "-O1"  # SIMDe's functions would keep GCC busy for minutes
LEVELS = {
    "amx": [*AVX512, "-DBLADE_EMULATE_VNNI", *AMX],
    "avx512bf16": [*AVX512, "-DBLADE_EMULATE_VNNI", "-DBLADE_EMULATE_BF16"],
    "avx512vnni": [*AVX512, "-DBLADE_EMULATE_VNNI"],
    "avx512": AVX512,
}


def library_name(level: str) -> str:
    """Of a level's library, beside those that run as they are."""
    return f"{level}-emulated"


def flags(cxx: str, level: str) -> list[str]:
    """Of the compiler; of AMX only the tile instructions are emulated where the machine has the rest."""
    if level == "amx" and "avx512vnni" in build.runnable_levels(cxx):
        return [OPTIMIZATION, *build.levels()["avx512vnni"], *AMX]
    return [OPTIMIZATION, *LEVELS[level]]


def main() -> None:
    cxx = build.compiler()
    if cxx is None:
        sys.exit("no C++ compiler: install g++ or name one in $CXX")
    levels = sys.argv[1:] or list(LEVELS)
    if unknown := set(levels) - LEVELS.keys():
        sys.exit(f"no level {min(unknown)!r} is emulated; there are {', '.join(LEVELS)}")
    build.compile_levels(cxx, {library_name(level): flags(cxx, level) for level in levels})


if __name__ == "__main__":
    main()
