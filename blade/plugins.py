"""Discover, load, and collect what plugins register; every conflict is an error that names both parties.

A plugin is a module announced by an entry point in group `blade`. Built-ins are always loaded, third-party plugins
only when named: installing a package runs none of its code here.
"""

from __future__ import annotations

import logging
import types
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from typing import TYPE_CHECKING, Any

import pluggy

from blade import hookspecs
from blade.errors import BladeError, PluginError
from blade.registry import Registry, describe, suggest
from blade.types import DefaultCheckpoint, RequestSummary

if TYPE_CHECKING:
    from cyclopts import App

    from blade.contracts import Server

GROUP = "blade"
DISTRIBUTION = "blade-llm"
HOOKS = tuple(name for name, hook in vars(hookspecs).items() if hasattr(hook, f"{GROUP}_spec"))

logger = logging.getLogger(__name__)


@dataclass(slots=True, frozen=True)
class PluginInfo:
    """One announced plugin, as `blade plugins` lists it."""

    name: str
    distribution: str
    version: str
    module: str
    hooks: tuple[str, ...] | None = None  # None: not loaded, so nobody knows

    @property
    def builtin(self) -> bool:
        return self.distribution == DISTRIBUTION

    @property
    def origin(self) -> str:
        return "built-in" if self.builtin else "third-party"

    @property
    def loaded(self) -> bool:
        return self.hooks is not None

    def __str__(self) -> str:
        return f"{self.name!r} ({self.distribution} {self.version})"


def load(names: Sequence[str] = ()) -> Plugins:
    """Import all built-ins and the third-party plugins among `names`, in this order; check every hook they
    implement."""
    announced = {info.name: (info, entry_point) for info, entry_point in _announced()}
    builtins = [name for name, (info, _) in announced.items() if info.builtin]
    if not builtins:
        raise PluginError(
            f"The distribution {DISTRIBUTION} is not installed, so its own plugins cannot be found.",
            "Run `pip install .` (or `pip install -e .`) in blade's folder.",
        )
    for name in names:
        if name not in announced:
            raise PluginError(f"Unknown plugin {name!r}.", suggest(name, announced))
    wanted = dict.fromkeys([*builtins, *names])  # each once, in order
    modules = {name: _import(*announced[name]) for name in wanted}
    return Plugins(modules, [info for info, _ in announced.values()])


class Plugins:
    """The loaded plugins and what they bring. `modules` maps a plugin's name to the module with its hookimpls."""

    def __init__(self, modules: Mapping[str, object], announced: Iterable[PluginInfo] = ()) -> None:
        self._pm = pluggy.PluginManager(GROUP)
        self._pm.add_hookspecs(hookspecs)
        hooks = {name: _register(self._pm, name, module) for name, module in modules.items()}
        self._infos = [replace(info, hooks=hooks.get(info.name)) for info in announced]
        self._observers = list(self._each("request_finished"))

    def table(self) -> list[PluginInfo]:
        """Every installed plugin, loaded or not."""
        return list(self._infos)

    def registry(self, hook: str, reserved: Iterable[str] = ()) -> Registry:
        """Call a `register_*` hook and collect what it registers; `reserved` names belong to blade itself."""
        registry = Registry(hook, reserved, [info.name for info in self._infos if not info.loaded])
        for plugin, call in self._each(hook):
            _guard(plugin, hook, partial(call, register=partial(registry.add, plugin)))
        return registry

    def default_checkpoint(self, plugin: str) -> DefaultCheckpoint | None:
        """The model that this plugin serves when none is named; None if it has no default."""
        registry = self.registry("register_models")
        entries = [entry for name in registry if (entry := registry.entry(name)).plugin == plugin and entry.default]
        if len({entry.default for entry in entries}) > 1:
            names = ", ".join(entry.name for entry in entries)
            raise PluginError(f"Plugin {plugin!r} has several default checkpoints: {names}.", "Pass --model.")
        return entries[0].default if entries else None

    def register_commands(self, cli: App) -> None:
        """Let every plugin add its commands to `cli`."""
        from cyclopts import CommandCollisionError

        owners = dict.fromkeys(cli, "blade itself")
        for plugin, call in self._each("register_commands"):
            try:
                _guard(plugin, "register_commands", partial(call, cli=cli))
            except PluginError as error:
                if not isinstance(error.__cause__, CommandCollisionError):
                    raise
                command = next((name for name in owners if f'"{name}"' in str(error)), "")
                other = owners.get(command, f"plugin {plugin!r} once more")
                raise PluginError(
                    f"The command {command!r} is registered by plugin {plugin!r} and by {other}.",
                    "Load only one of the two, or rename the command.",
                ) from error
            owners = dict.fromkeys(cli, f"plugin {plugin!r}") | owners

    @asynccontextmanager
    async def lifespans(self, server: Server) -> AsyncIterator[None]:
        """Enter every plugin's `lifespan`. Failing to start is a PluginError; failing to stop is logged, and the
        others still stop."""
        async with AsyncExitStack() as stack:
            for plugin, call in self._each("lifespan"):
                for context in _guard(plugin, "lifespan", partial(call, server=server)):
                    try:
                        await context.__aenter__()
                    except Exception as error:
                        raise _failure(plugin, "lifespan", error) from error
                    stack.push_async_callback(_leave, plugin, context)
            yield

    def request_finished(self, summary: RequestSummary) -> None:
        """Tell every observer; one that fails is logged and hinders neither the request nor the others."""
        for plugin, call in self._observers:
            try:
                call(summary=summary)
            except Exception:
                logger.exception("Plugin %r failed in request_finished.", plugin)

    def _each(self, hook: str) -> Iterator[tuple[str, Callable[..., list[Any]]]]:
        """(plugin, what calls its implementation of `hook` alone), in loading order."""
        plugins = self._pm.get_plugins()
        implementing = {impl.plugin_name for impl in getattr(self._pm.hook, hook).get_hookimpls()}
        for name, plugin in self._pm.list_name_plugin():
            if name in implementing:
                yield name, self._pm.subset_hook_caller(hook, plugins - {plugin})


def _announced() -> list[tuple[PluginInfo, metadata.EntryPoint]]:
    """All installed plugins, built-ins first, by name; imports none. A name claimed twice is a PluginError."""
    # pluggy's own loader silently skips a name that is already taken, so the entry points are walked here.
    found: dict[str, tuple[PluginInfo, metadata.EntryPoint]] = {}
    for entry_point in metadata.entry_points(group=GROUP):
        dist = entry_point.dist
        if dist is None:
            continue
        info = PluginInfo(entry_point.name, dist.name, dist.version, entry_point.value)
        if other := found.get(info.name):
            raise PluginError(
                f"The plugin name {info.name!r} is claimed by {other[0].distribution} and by {info.distribution}.",
                "Uninstall one of the two distributions.",
            )
        found[info.name] = (info, entry_point)
    return sorted(found.values(), key=lambda pair: (not pair[0].builtin, pair[0].name))


def _import(info: PluginInfo, entry_point: metadata.EntryPoint) -> object:
    try:
        return entry_point.load()
    except (Exception, SystemExit) as error:
        raise PluginError(
            f"Plugin {info} could not import {info.module!r}: {describe(error)}.",
            f"Reinstall {info.distribution}" + ("." if info.builtin else f" or start without --plugin {info.name}."),
        ) from error


def _register(pm: pluggy.PluginManager, name: str, module: object) -> tuple[str, ...]:
    """Register one plugin after checking what pluggy would let pass; returns the hooks it implements."""
    try:
        pm.register(module, name)
    except (ValueError, pluggy.PluginValidationError) as error:
        raise PluginError(f"Plugin {name!r} does not fit: {describe(error)}.", "Correct the plugin.") from error
    implemented = []
    for caller in pm.get_hookcallers(module) or []:
        impl = next(impl for impl in caller.get_hookimpls() if impl.plugin is module)
        if caller.has_spec():
            implemented.append(caller.name)
        elif not impl.optionalhook:
            raise PluginError(
                f"Plugin {name!r} implements the unknown hook {caller.name!r}.", suggest(caller.name, HOOKS)
            )
        if impl.kwargnames:  # pluggy never passes these
            raise PluginError(
                f"Plugin {name!r} gives {', '.join(impl.kwargnames)} of its hook {caller.name!r} a default.",
                "Remove the default: blade always passes the argument.",
            )
    for hook in HOOKS:
        if hook not in implemented and isinstance(getattr(module, hook, None), types.FunctionType):
            raise PluginError(f"Plugin {name!r} defines {hook} unmarked.", "Decorate it with @blade.hookimpl.")
    return tuple(sorted(implemented, key=HOOKS.index))


def _guard(plugin: str, hook: str, call: Callable[[], list[Any]]) -> list[Any]:
    try:
        return call()
    except BladeError:
        raise
    except Exception as error:
        raise _failure(plugin, hook, error) from error


def _failure(plugin: str, hook: str, error: Exception) -> PluginError:
    return PluginError(f"Plugin {plugin!r} failed in its hook {hook}: {describe(error)}.", "Correct the plugin.")


async def _leave(plugin: str, context: Any) -> None:
    try:
        await context.__aexit__(None, None, None)
    except Exception:
        logger.exception("Plugin %r failed while the server stopped.", plugin)
