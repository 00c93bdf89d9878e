"""What a person sees on the terminal: progress while loading, the banner, tables. Plain lines when it is not one."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from blade.plugins import PluginInfo


@contextmanager
def progress(title: str, total: int, unit: str = "bytes") -> Iterator[Callable[[int], None]]:
    """A bar for `total` bytes (or steps) on standard error; yields what to call with each further amount."""
    if not sys.stderr.isatty():
        print(f"{title} ...", file=sys.stderr, flush=True)
        yield lambda amount: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    count = DownloadColumn() if unit == "bytes" else MofNCompleteColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), count, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(title, total=total)
        yield lambda amount: bars.advance(task, amount)


def print_plugins(plugins: Iterable[PluginInfo]) -> None:
    """The table of `blade plugins`."""
    rows = [
        (
            plugin.name,
            f"{plugin.distribution} {plugin.version}",
            plugin.origin,
            "not loaded" if plugin.hooks is None else ", ".join(plugin.hooks),
        )
        for plugin in plugins
    ]
    if not sys.stdout.isatty():
        for row in rows:
            print("\t".join(row))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("plugin", "package", "origin", "hooks", box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    Console().print(table)
