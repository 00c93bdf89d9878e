"""What the plugins registered under one hook: name -> factory, and who brought it."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from blade import contracts
from blade.errors import BladeError, PluginError
from blade.types import DefaultCheckpoint

Factory = Callable[..., Any]

KINDS: dict[str, tuple[str, type | None]] = {
    "register_models": ("architecture", contracts.Architecture),
    "register_quantizations": ("quantization", contracts.Quantization),
    "register_backends": ("backend", contracts.Ops),
    "register_attention": ("attention backend", contracts.Attention),
    "register_schedulers": ("scheduler", contracts.Scheduler),
    "register_drafters": ("drafter", contracts.Drafter),
    "register_executors": ("executor", contracts.Executor),
    "register_logits_processors": ("logits processor", None),
    "register_tool_parsers": ("tool parser", contracts.ToolParser),
    "register_reasoning_parsers": ("reasoning parser", contracts.ReasoningParser),
    "register_routes": ("route", None),
}
"""hook -> (what a person calls its entries, the protocol that what its factories make must fit)."""

_ROUTE = re.compile(r"(GET|HEAD|POST|PUT|PATCH|DELETE|OPTIONS) /\S*")


@dataclass(slots=True, frozen=True)
class Entry:
    """One registration."""

    name: str
    factory: Factory
    plugin: str  # name of the plugin that registered it
    default: DefaultCheckpoint | None = None  # architectures only
    plain: bool = False  # quantizations only: makes the format of plain weights


class Registry:
    """The entries of one hook. Looking up an unknown name raises PluginError with the closest match."""

    def __init__(self, hook: str, reserved: Iterable[str] = (), unloaded: Iterable[str] = ()) -> None:
        """`reserved` names belong to blade itself; `unloaded` plugins are installed but were not asked for."""
        self.kind, self._protocol = KINDS[hook]
        self._hook = hook
        self._reserved = frozenset(reserved)
        self._unloaded = tuple(unloaded)
        self._entries: dict[str, Entry] = {}

    def __getitem__(self, name: str) -> Factory:
        return self.entry(name).factory

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def entry(self, name: str) -> Entry:
        if name not in self._entries:
            remedy = suggest(name, self._entries)
            if self._unloaded:
                remedy += f" Installed but not loaded: {', '.join(self._unloaded)} (load with --plugin NAME)."
            raise PluginError(f"Unknown {self.kind} {name!r}.", remedy)
        return self._entries[name]

    def create(self, name: str, *args: Any) -> Any:
        """Call the factory of `name`; what goes wrong there, or comes out wrong, is said with the plugin's name."""
        entry = self.entry(name)
        try:
            made = entry.factory(*args)
        except BladeError:
            raise
        except Exception as error:
            raise PluginError(
                f"Plugin {entry.plugin!r} could not make its {self.kind} {name!r}: {describe(error)}.",
                f"Report it to the plugin's author, or choose another {self.kind}.",
            ) from error
        if missing := [member for member in members(self._protocol) if not hasattr(made, member)]:
            raise PluginError(
                f"The {self.kind} {name!r} of plugin {entry.plugin!r} lacks {', '.join(missing)}.",
                f"Give it all members of blade.contracts.{self._protocol.__name__ if self._protocol else ''}.",
            )
        return made

    def add(
        self, plugin: str, name: str, factory: Factory, default: DefaultCheckpoint | None = None, plain: bool = False
    ) -> None:
        """Called through the hook: register(name, factory), for architectures default=... too, for quantizations
        plain=... ."""
        self._check_shape(plugin, name, factory, default, plain)
        if name in self._entries or name in self._reserved:
            other = f"plugin {self._entries[name].plugin!r}" if name in self._entries else "blade itself"
            raise PluginError(
                f"The {self.kind} {name!r} is registered by plugin {plugin!r} and by {other}.",
                f"Load only one of the two plugins, or have {plugin!r} register under another name.",
            )
        self._entries[name] = Entry(name, factory, plugin, default, bool(plain))

    def _check_shape(self, plugin: str, name: str, factory: Factory, default: object, plain: object) -> None:
        problem = ""
        if not isinstance(name, str) or not name:
            problem = f"its name must be a non-empty string, not {name!r}"
        elif not callable(factory):
            problem = f"the factory of {name!r} must be callable, not {type(factory).__name__}"
        elif self._hook == "register_routes" and not _ROUTE.fullmatch(name):
            problem = f"its name must read like 'GET /path', not {name!r}"
        elif self._hook == "register_routes" and not is_async(factory):
            problem = f"the handler of {name!r} must be an async function"
        elif default is not None and self._hook != "register_models":
            problem = f"{name!r} brings a default checkpoint, which only architectures have"
        elif plain and self._hook != "register_quantizations":
            problem = f"{name!r} says plain={plain!r}, which only quantizations may"
        elif not isinstance(default, DefaultCheckpoint | None):
            problem = f"the default of {name!r} must be a blade.DefaultCheckpoint, not {type(default).__name__}"
        if problem:
            raise PluginError(f"Plugin {plugin!r} registers no valid {self.kind}: {problem}.", "Correct the plugin.")


def suggest(name: str, known: Iterable[str]) -> str:
    """The remedy for an unknown name."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"Did you mean {close[0]!r}? " if close else ""
    return f"{hint}Known: {', '.join(known) or 'none'}."


def describe(error: BaseException) -> str:
    """An exception of somebody else's code for the operator to read, on one line without a full stop."""
    return " ".join(f"{type(error).__name__}: {error}".split()).rstrip(":.")


def members(protocol: type | None) -> list[str]:
    """Names of the methods and attributes that an object of this protocol has."""
    if protocol is None:
        return []
    return [name for name in {**vars(protocol), **inspect.get_annotations(protocol)} if not name.startswith("_")]


def is_async(function: Any) -> bool:
    """Whether calling it gives an awaitable: an async function, or an object with an async __call__."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004
