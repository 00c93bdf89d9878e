"""Tables for the terminal; plain tab-separated lines when it is not one."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from blade.plugins import PluginInfo


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
