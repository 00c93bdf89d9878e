"""The `blade` command. Options are the fields of `blade.config`; this file only turns them into a Config."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Annotated

from cyclopts import App, CycloptsError, Group, Parameter

from blade import __version__
from blade.config import Config, DraftOptions, EngineConfig, ModelOptions, ServerOptions
from blade.errors import BladeError

BAD_USAGE = 2  # exit status of everything the user can mend

app = App(name="blade", help="An LLM inference server.", version=__version__)


Names = Annotated[tuple[str, ...], Parameter(parse=False)]  # of the plugins that were named; `launch` fills it


def _group(title: str, order: int, prefix: str = "*") -> Parameter:
    return Parameter(name=prefix, group=Group(title, sort_key=order))


@app.command
def serve(
    *,
    plugins: Names = (),
    dry_run: Annotated[bool, Parameter(negative="")] = False,
    model: Annotated[ModelOptions, _group("Model", 1)] = ModelOptions(),
    draft: Annotated[DraftOptions, _group("Draft model", 2, "draft")] = DraftOptions(),
    engine: Annotated[EngineConfig, _group("Engine", 3)] = EngineConfig(),
    server: Annotated[ServerOptions, _group("Server", 4)] = ServerOptions(),
) -> None:
    """Serve a model over HTTP.

    Parameters
    ----------
    dry_run
        Print the resolved configuration, the memory plan and the equivalent command, and stop.
    """
    from blade import serve as server_main

    config = Config(plugins=plugins, model=model, draft=draft, engine=engine, server=server)
    if dry_run:
        server_main.dry_run(config)
    else:
        server_main.run(config)


@app.command
def inspect(
    checkpoint: str | None = None,
    /,
    *,
    plugins: Names = (),
    json: Annotated[bool, Parameter(negative="")] = False,
    model: Annotated[ModelOptions, _group("Model", 1)] = ModelOptions(),
    engine: Annotated[EngineConfig, _group("Engine", 2)] = EngineConfig(),
) -> None:
    """Tell what a checkpoint is, and whether and how fast blade can run it here. Its weights are not loaded.

    Parameters
    ----------
    checkpoint
        A folder, a .gguf file or a hub id (which is fetched), as --model.
    json
        Print one JSON object instead of lines for a person.
    """
    from msgspec.json import encode

    from blade import inspection
    from blade.plugins import load

    if checkpoint is not None:
        model = replace(model, model=checkpoint)
    found = inspection.inspect(Config(plugins=plugins, model=model, engine=engine), load(plugins))
    print(encode(found).decode() if json else "\n".join(inspection.lines(found)))
    if found.problem:
        sys.exit(1)


@app.command(name="plugins")
def list_plugins(*, plugins: Names = ()) -> None:
    """List the plugins that are installed: name, version, hooks, origin, loaded or not."""
    from blade.console import print_plugins
    from blade.plugins import load

    print_plugins(load(plugins).table())


_OWN_COMMANDS = frozenset(app)


@app.meta.default
def launch(
    *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    plugin: Annotated[tuple[str, ...], Parameter(negative="")] = (),
) -> None:
    """Load the plugins, which may bring commands, then run the command.

    Parameters
    ----------
    plugin
        Load this plugin; repeat for more (and see BLADE_PLUGINS, a comma-separated list of others). A model family's
        plugin also brings its default checkpoint.
    """
    gc.disable()  # a start makes objects and drops few: collecting costs a tenth of it; blade.serve turns it on again
    if "serve" in tokens:
        from blade.serve import link_torch

        link_torch()
    from blade.opening import opener

    from_environment = (name.strip() for name in os.environ.get("BLADE_PLUGINS", "").split(","))
    plugin = tuple(dict.fromkeys((*plugin, *filter(None, from_environment))))
    _add_commands(plugin)
    command, bound, ignored = app.parse_args(tokens, exit_on_error=False, print_error=True)
    given = {"plugins": plugin, "open_model": opener(plugin)}
    command(*bound.args, **bound.kwargs, **{name: value for name, value in given.items() if name in ignored})


def _add_commands(plugins: Sequence[str]) -> None:
    """Those of the plugins, in place of any that an earlier call in this process has added."""
    from blade.plugins import load

    for name in set(app) - _OWN_COMMANDS:
        del app[name]
    load(plugins).register_commands(app)


def main(args: list[str] | None = None, program: str = "blade", spelt: Callable[[str], str] = str) -> None:
    """Entry point. Exit status 0, or 2 with one sentence on standard error, of `program` and as `spelt` has it."""
    args = sys.argv[1:] if args is None else args
    try:
        if {"--help", "-h"}.intersection(args):  # which is shown before `launch` is called
            _add_commands([name for option, name in pairwise(args) if option == "--plugin"])
        app.meta(args, exit_on_error=False, print_error=True)
    except CycloptsError:
        sys.exit(BAD_USAGE)
    except BladeError as error:
        print(f"{program}: {spelt(str(error))}", file=sys.stderr)
        sys.exit(BAD_USAGE)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # `blade plugins | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
