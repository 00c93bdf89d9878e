"""The AVX-512 kernels for tests on a machine without AVX-512: ``python -m blade_native.simd.emulated``.

The same sources, compiled for AVX2 with SIMDe in place of the intrinsics (cpu/emulated/avx512.h). Needs its headers,
Debian's libsimde-dev. What the compiler would make of real AVX-512 is not tested by this, nor is the inline assembly.
"""

from __future__ import annotations

import sys

from blade_native.simd import build

HEADER = build.SOURCES / "emulated" / "avx512.h"
# Without most optimisation: SIMDe's functions would keep GCC busy for minutes.
FLAGS = ["-O1", "-march=x86-64-v3", "-include", str(HEADER)]
LEVELS = {
    "avx512bf16": [*FLAGS, "-DBLADE_EMULATE_VNNI", "-DBLADE_EMULATE_BF16"],
    "avx512vnni": [*FLAGS, "-DBLADE_EMULATE_VNNI"],
    "avx512": FLAGS,
}


def library_name(level: str) -> str:
    """Of a level's library, beside those that run as they are."""
    return f"{level}-emulated"


def main() -> None:
    cxx = build.compiler()
    if cxx is None:
        sys.exit("no C++ compiler: install g++ or name one in $CXX")
    build.compile_levels(cxx, {library_name(level): flags for level, flags in LEVELS.items()})


if __name__ == "__main__":
    main()
