"""Fault injection: a kernel's test is worth something when it fails for a broken kernel.

    SUITE = Suite(
        Path("matmul.cu"),
        run,  # run(launcher, source) launches the kernel and asserts that the result is right
        [Fault("no barrier", "__syncthreads();  // the tile is whole", "", caught_by="thread")],
    )

`SUITE.survivors()` in a test breaks the source in each way and returns the faults that nothing caught. Those that need
a sanitizer run in a process of their own: `python -m blade_native.emulator.faults tests/test_matmul.py:SUITE`.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from blade_native.cuda.launch import Launcher, Module
from blade_native.cuda.source import inline
from blade_native.emulator import emulated, sanitizer
from blade_native.emulator.kernel_double import CUDADriverError, EmulatorError

IN_PROCESS = ("result", "report")  # a wrong result; an error of the emulator's or of the driver's checks
CAUGHT, SURVIVED = 0, 3  # exit status of a child that ran to its end
TIME_LIMIT_S = 5.0  # of CPU time for a broken kernel: some never end


class Redirected(Launcher):
    """Compiles the source `path` wherever one of its name is asked for: how a test's own code gets a broken kernel."""

    def __init__(self, launcher: Launcher, path: Path) -> None:
        super().__init__(launcher.cupy, launcher.device)
        self.path = path

    def load(self, path: Path | str, expressions: Iterable[str], options: Iterable[str] = ()) -> Module:
        return super().load(self.path if Path(path).name == self.path.name else path, expressions, options)


@dataclass(frozen=True)
class Fault:
    """A mutation of the source's text: `old`, which is there exactly once, becomes `new`. `caught_by` names what has to
    notice: "result", "report", or the sanitizer "address", "undefined" or "thread"."""

    name: str
    old: str
    new: str
    caught_by: str

    def inject(self, source: str) -> str:
        """Raises ValueError where the source has changed under the fault."""
        if source.count(self.old) != 1:
            raise ValueError(f"fault {self.name!r}: {self.old!r} is {source.count(self.old)} times in the source")
        return source.replace(self.old, self.new)


@dataclass(frozen=True)
class Suite:
    """A kernel's source, the test that has to hold for it, and what has to break that test."""

    source: Path
    run: Callable[[Launcher, Path], None]
    faults: Sequence[Fault]

    def survivors(self, names: Collection[str] | None = None) -> list[str]:
        """Those of the named faults, of all where there are no names, that need no sanitizer and that were not caught.
        Checks the unbroken source first."""
        self.run(emulated(), self.source)
        chosen = [fault for fault in self.faults if names is None or fault.name in names]
        return [fault.name for fault in chosen if fault.caught_by in IN_PROCESS and not self.catches(fault)]

    def catches(self, fault: Fault) -> bool:
        """Whether the run on the broken source fails as the fault says it must, in this process. Failing otherwise is
        no catch: the fault was not what its author thought."""
        expected = AssertionError if fault.caught_by == "result" else (EmulatorError, CUDADriverError, TypeError)
        with tempfile.TemporaryDirectory() as folder:
            broken = Path(folder, self.source.name)
            broken.write_text(fault.inject(inline(self.source)), encoding="utf-8")
            launcher = emulated()
            launcher.cupy.time_limit_s = TIME_LIMIT_S
            try:
                self.run(launcher, broken)
            except Exception as error:
                return isinstance(error, expected)
        return False


def load_suite(name: str) -> Suite:
    """The Suite that "path/to/file.py:NAME" holds."""
    path, _, attribute = name.rpartition(":")
    spec = importlib.util.spec_from_file_location("fault_suite", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    suite = getattr(module, attribute)
    if not isinstance(suite, Suite):
        raise TypeError(f"{name} is a {type(suite).__name__}, not a Suite")
    return suite


def under_sanitizer(name: str, fault: str | None, sanitize: str) -> str | None:
    """Run the suite `name` with one fault, or with none, in a process under a sanitizer: the sanitizer's report, None
    where it had none. Raises RuntimeError when the process fails otherwise."""
    command = [sys.executable, "-m", "blade_native.emulator.faults", name, "--child", fault or ""]
    done = subprocess.run(command, env=sanitizer.environment(sanitize), capture_output=True, text=True)
    report = sanitizer.report(done.stderr)
    if report is None and done.returncode not in (CAUGHT, SURVIVED):
        raise RuntimeError(f"{name} {fault or 'unbroken'} under {sanitize}: {done.stderr[-2000:]}")
    return report


def child(suite: Suite, name: str) -> int:
    """One run in a process that a sanitizer watches; a wrong result alone does not count as caught."""
    fault = next((fault for fault in suite.faults if fault.name == name), None)
    if fault is None:
        suite.run(emulated(), suite.source)
        return SURVIVED
    with tempfile.TemporaryDirectory() as folder:
        broken = Path(folder, suite.source.name)
        broken.write_text(fault.inject(inline(suite.source)), encoding="utf-8")
        try:
            suite.run(emulated(), broken)
        except (AssertionError, EmulatorError):
            return CAUGHT
    return SURVIVED


def check(name: str) -> int:
    """Print what caught each fault of a suite; the number that nothing caught, or that the unbroken source has."""
    suite = load_suite(name)
    suite.run(emulated(), suite.source)
    failures = 0
    for sanitize in sanitizer.NAMES:
        report = under_sanitizer(name, None, sanitize)
        failures += report is not None
        print(f"{report or 'clean under ' + sanitize}", flush=True)
    for fault in suite.faults:
        if fault.caught_by in IN_PROCESS:
            caught = suite.catches(fault)
        else:
            caught = under_sanitizer(name, fault.name, fault.caught_by) is not None
        failures += not caught
        print(f"{'caught by ' + fault.caught_by if caught else 'SURVIVED':20} {fault.name}", flush=True)
    return failures


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m blade_native.emulator.faults", description=__doc__)
    parser.add_argument("suites", nargs="+", metavar="FILE.py:NAME")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    sys.path.insert(0, os.getcwd())
    if given.child is not None:
        return child(load_suite(given.suites[0]), given.child)
    return 1 if sum([check(name) for name in given.suites]) else 0


if __name__ == "__main__":
    from blade_native.emulator import faults  # the module that suites import, not this one

    sys.exit(faults.main())
