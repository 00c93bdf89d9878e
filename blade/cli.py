"""The `blade` command. Options are the fields of `blade.config`; this file only turns them into a Config."""

from __future__ import annotations

import os
import sys
from typing import Annotated

from cyclopts import App, CycloptsError, Group, Parameter

from blade import __version__
from blade.config import Config, EngineConfig, ModelOptions, ServerOptions
from blade.errors import BladeError

BAD_USAGE = 2  # exit status of everything the user can mend

app = App(name="blade", help="An LLM inference server.", version=__version__)


def _group(title: str, order: int) -> Parameter:
    return Parameter(name="*", group=Group(title, sort_key=order))


@app.command
def serve(
    *,
    plugin: Annotated[tuple[str, ...], Parameter(negative="")] = (),
    dry_run: Annotated[bool, Parameter(negative="")] = False,
    model: Annotated[ModelOptions, _group("Model", 1)] = ModelOptions(),
    engine: Annotated[EngineConfig, _group("Engine", 2)] = EngineConfig(),
    server: Annotated[ServerOptions, _group("Server", 3)] = ServerOptions(),
) -> None:
    """Serve a model over HTTP.

    Parameters
    ----------
    plugin
        Load this plugin; repeat for more. A model family's plugin also brings its default checkpoint.
    dry_run
        Print the resolved configuration, the memory plan and the equivalent command, and stop.
    """
    from blade import serve as server_main

    config = Config(plugins=_plugin_names(plugin), model=model, engine=engine, server=server)
    if dry_run:
        server_main.dry_run(config)
    else:
        server_main.run(config)


@app.command(name="plugins")
def list_plugins(*, plugin: Annotated[tuple[str, ...], Parameter(negative="")] = ()) -> None:
    """List the plugins that are installed: name, version, hooks, origin, loaded or not.

    Parameters
    ----------
    plugin
        Load this third-party plugin as well, to see its hooks.
    """
    from blade.console import print_plugins
    from blade.plugins import load

    print_plugins(load(_plugin_names(plugin)).table())


def _plugin_names(named: tuple[str, ...]) -> tuple[str, ...]:
    """Those of --plugin, then those of BLADE_PLUGINS (comma separated), each once."""
    from_environment = (name.strip() for name in os.environ.get("BLADE_PLUGINS", "").split(","))
    return tuple(dict.fromkeys((*named, *filter(None, from_environment))))


def _named_in(args: list[str]) -> tuple[str, ...]:
    """The --plugin values of a command line: plugins may bring commands, so they are needed before it is parsed."""
    pairs = zip(args, [*args[1:], ""], strict=True)
    spaced = [value for option, value in pairs if option == "--plugin" and value and not value.startswith("-")]
    return (*spaced, *(arg.removeprefix("--plugin=") for arg in args if arg.startswith("--plugin=")))


def main(args: list[str] | None = None) -> None:
    """Entry point. Exit status 0, or 2 with one sentence on standard error."""
    args = sys.argv[1:] if args is None else args
    try:
        from blade.plugins import load

        load(_plugin_names(_named_in(args))).register_commands(app)
        app(args, exit_on_error=False, print_error=True)
    except CycloptsError:
        sys.exit(BAD_USAGE)
    except BladeError as error:
        print(f"blade: {error}", file=sys.stderr)
        sys.exit(BAD_USAGE)
    except KeyboardInterrupt:
        sys.exit(130)
