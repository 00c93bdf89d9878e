"""Which level a machine is found to have, on machines made up."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from blade_native.simd import build
from blade_native.simd.library import MACHINE_LEVELS

# Answers for the processor and the system: what level.cpp asks, from the variables of the library.
PRELUDE = """
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <cstring>
extern "C" __attribute__((visibility("default"))) int level, intel, tiles, osxsave, saved, permission;
int level, intel, tiles, osxsave, saved, permission;  // permission: what the request returns; below 0: not asked yet
static int asked(long request, long which) { return request == 0x1023 && which == 18 ? permission : -1; }
static bool has(const char* name) {
    if (!strcmp(name, "avx512bf16")) return level >= 4;
    if (!strcmp(name, "avx512vnni")) return level >= 3;
    return level >= (strncmp(name, "avx512", 6) ? 1 : 2);
}
static int leaf(unsigned number, unsigned* c, unsigned* d) {
    *c = number == 1 && osxsave ? bit_OSXSAVE : 0;
    *d = number == 7 ? unsigned(tiles) << 22 : 0;
    return 1;
}
#define __builtin_cpu_supports(name) has(name)
#define __builtin_cpu_is(name) intel
#define __get_cpuid(number, a, b, c, d) leaf(number, c, d)
#define __get_cpuid_count(number, sub, a, b, c, d) leaf(number, c, d)
#define _xgetbv(which) ((unsigned long long)(saved) << 17 | 7)
#define syscall(number, request, which) (number == SYS_arch_prctl ? asked(request, which) : -1)
"""
SAPPHIRE_RAPIDS = {"level": 4, "intel": 1, "tiles": 0b1101, "osxsave": 1, "saved": 0b11, "permission": 0}


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    cxx = build.compiler()
    if cxx is None or len(build.levels()) == 1:
        pytest.skip("there is no C++ compiler, or one level alone")
    folder = tmp_path_factory.mktemp("level")
    prelude, target = folder / "prelude.h", folder / "level.so"
    prelude.write_text(PRELUDE)
    define = '-DBLADE_SOURCE_HASH=""'
    source = str(build.SOURCES / "level.cpp")
    build.run([cxx, *build.FLAGS, "-O0", define, "-include", str(prelude), "-shared", source, "-o", str(target)])
    return ctypes.CDLL(str(target))


def levels_of(machine: ctypes.CDLL, **facts: int) -> list[str]:
    """The fastest first."""
    for name, value in {**SAPPHIRE_RAPIDS, **facts}.items():
        ctypes.c_int.in_dll(machine, name).value = value
    found = range(machine.blade_machine_level() + 1)
    return [MACHINE_LEVELS[i] for i in sorted(found, key=machine.blade_level_rank, reverse=True)]


def test_a_machine_with_amx_takes_it_and_next_to_it_what_multiplies_floats(machine: ctypes.CDLL) -> None:
    assert levels_of(machine) == ["amx", "avx512vnni", "avx512bf16", "avx512", "avx2", "portable"]


@pytest.mark.parametrize(
    "lack",
    [
        {"tiles": 0b1100},  # bf16
        {"tiles": 0b1001},  # registers
        {"tiles": 0b0101},  # bytes
        {"osxsave": 0},
        {"saved": 0b01},  # what registers hold
        {"saved": 0b10},  # their shapes
        {"permission": -1},
    ],
    ids=str,
)
def test_where_any_part_of_amx_is_missing_the_next_level_is_taken(machine: ctypes.CDLL, lack: dict[str, int]) -> None:
    assert levels_of(machine, **lack)[0] == "avx512vnni"
    assert levels_of(machine, intel=0, **lack)[0] == "avx512bf16"


@pytest.mark.parametrize("level", range(4))
def test_lesser_machines_have_what_their_level_and_those_below_need(machine: ctypes.CDLL, level: int) -> None:
    assert levels_of(machine, level=level) == list(reversed(MACHINE_LEVELS[: level + 1]))


def test_levels_are_named_alike_where_they_are_built_and_loaded() -> None:
    if len(build.levels()) > 1:
        assert tuple(reversed(build.levels())) == MACHINE_LEVELS


@pytest.mark.parametrize(
    ("flag", "known"),
    [("-mamx", ["avx512bf16", "avx512vnni", "avx512", "avx2", "portable"]), ("-march=x86-64-v", ["portable"])],
)
def test_levels_are_left_out_where_the_compiler_does_not_know_them(
    flag: str, known: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cxx = build.compiler()
    if cxx is None or len(build.levels()) == 1:
        pytest.skip("there is no C++ compiler, or one level alone")
    old = tmp_path / "old-g++"
    refuse = f'case "$*" in *{flag}*) echo "unrecognized option {flag}" >&2; exit 1;; esac'
    old.write_text(f'#!/bin/sh\n{refuse}\nexec {cxx} "$@"\n')
    old.chmod(0o755)
    assert build.wanted_levels(str(old), {"BLADE_CPU_LEVELS": "all"}) == known
    monkeypatch.setattr(build, "runnable_levels", lambda cxx: list(build.levels()))
    assert build.best_level(str(old)) == known[0]
    assert build.best_level(cxx) == ("amx" if build.can_compile(cxx, "amx") else "avx512bf16")
