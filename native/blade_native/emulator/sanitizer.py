"""Run Python with kernels compiled under g++'s sanitizers: the runtime has to be loaded before everything else.

python -m blade_native.emulator.sanitizer thread -m pytest tests/native_cuda
"""

from __future__ import annotations

import os
import re
import subprocess
import sys

from blade import ConfigError
from blade_native.emulator.build import compiler

NAMES = ("address", "undefined", "thread")
RUNTIMES = {"address": "libasan.so", "undefined": "libubsan.so", "thread": "libtsan.so"}
REPORT = re.compile(r"^(?:.*ERROR: AddressSanitizer|.*WARNING: ThreadSanitizer|.*runtime error:).*$", re.MULTILINE)
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0",  # Python frees little at its end
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "report_bugs=1 history_size=4",
    "OMP_NUM_THREADS": "1",  # libgomp's barriers are none to ThreadSanitizer: torch's own loops would look like races
}


def environment(name: str) -> dict[str, str]:
    """The environment of a process whose emulated kernels a sanitizer watches. Raises ConfigError for an unknown one or
    a g++ without it."""
    if name not in RUNTIMES:
        raise ConfigError(f"There is no sanitizer {name!r}.", f"Choose one of {', '.join(NAMES)}.")
    runtime = _library(RUNTIMES[name])
    if not os.path.isabs(runtime):
        raise ConfigError(f"g++ has no {RUNTIMES[name]}.", "Install the compiler's sanitizer runtimes.")
    # Python itself is C: a runtime that finds no C++ library at its start aborts at the first exception of torch's.
    preloaded = f"{runtime} {_library('libstdc++.so.6')}"
    return {**os.environ, **OPTIONS, "LD_PRELOAD": preloaded, "BLADE_EMULATOR_SANITIZE": name}


def _library(name: str) -> str:
    """The path of a library of g++'s; the bare name where it has none."""
    command = [compiler(), f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def report(text: str) -> str | None:
    """The first line of the first report in a process's standard error; None where there is none."""
    match = REPORT.search(text)
    return match[0] if match else None


def main() -> int:
    if len(sys.argv) < 3 or sys.argv[1] not in NAMES:
        sys.exit(f"usage: python -m blade_native.emulator.sanitizer {{{','.join(NAMES)}}} ARGUMENTS OF PYTHON")
    return subprocess.run([sys.executable, *sys.argv[2:]], env=environment(sys.argv[1])).returncode


if __name__ == "__main__":
    sys.exit(main())
