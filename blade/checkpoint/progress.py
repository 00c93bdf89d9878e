"""How far a download or a copy has come, told to whoever wants to show it."""

from __future__ import annotations

import math
import sys
import time
from contextlib import contextmanager
from threading import Lock
from typing import TYPE_CHECKING, Protocol, TextIO

if TYPE_CHECKING:
    from collections.abc import Iterator


_SECONDS = 2.0  # between two lines about the same thing


class Progress(Protocol):
    def __call__(self, label: str, done: int, total: int) -> None:
        """`done` of `total` bytes are through; total is 0 while unknown. May come from any thread."""
        ...


@contextmanager
def console_progress(stream: TextIO | None = None) -> Iterator[Progress]:
    """Bars on a terminal, anywhere else a line at the start, every two seconds and at the end; on stderr by default."""
    stream = stream or sys.stderr
    if stream.isatty():
        with _bars(stream) as progress:
            yield progress
    else:
        yield _lines(stream)


@contextmanager
def _bars(stream: TextIO) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TaskID, TextColumn, TransferSpeedColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    tasks: dict[str, TaskID] = {}
    lock = Lock()
    with Bars(*columns, console=Console(file=stream)) as bars:

        def show(label: str, done: int, total: int) -> None:
            with lock:
                if label not in tasks:
                    tasks[label] = bars.add_task(label)
                bars.update(tasks[label], completed=done, total=total or None)

        yield show


def _lines(stream: TextIO) -> Progress:
    shown: dict[str, float] = {}  # when the last line of a label was written; seconds, monotonic clock
    lock = Lock()

    def show(label: str, done: int, total: int) -> None:
        with lock:
            if done != total and time.monotonic() < shown.get(label, -math.inf) + _SECONDS:
                return
            shown[label] = time.monotonic()
            print(f"{label}: {done / 1e6:.0f} of {total / 1e6:.0f} MB", file=stream, flush=True)

    return show


def silent(label: str, done: int, total: int) -> None:
    """Shows nothing."""
