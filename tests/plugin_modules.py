"""Plugins made of plain functions."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

from blade import hookimpl
from blade.plugins import Plugins


def plugins(**modules: dict[str, Callable[..., Any]]) -> Plugins:
    """Plugins made of plain functions: plugins(a={"register_routes": function})."""
    loaded = {name: ModuleType(name) for name in modules}
    for name, hooks in modules.items():
        vars(loaded[name]).update(hooks)
    return Plugins(dict(loaded))


def registers(*args: Any, **kwargs: Any) -> Callable[..., Any]:
    return hookimpl(lambda register: register(*args, **kwargs))
