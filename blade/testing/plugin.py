"""The kit for whole plugins: hooks that fit, registrations that hold, and the law of what a plugin may import."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import blade
from blade.plugins import HOOKS, Plugins
from blade.registry import KINDS
from blade.testing.require import require

PUBLIC = ("blade.contracts", "blade.nn", "blade.testing")  # and the names in blade.__all__
HEAVY = ("torch", "transformers", "huggingface_hub", "gguf", "cupy")


def check_plugin(module: ModuleType) -> None:
    """It implements hooks, registers without a conflict, adds its commands, imports blade's public surface only, and
    is cheap to import (heavy libraries are imported inside factories)."""
    plugins = Plugins({module.__name__: module})
    require(any(hasattr(module, hook) for hook in HOOKS), f"{module.__name__} implements no hook")
    for hook in KINDS:
        plugins.registry(hook)
    plugins.default_checkpoint(module.__name__)
    _check_commands(plugins)
    for path in source_files(module):
        foreign = [name for name in imported(path) if not is_public(name)]
        require(not foreign, f"{path.name} imports {', '.join(foreign)}; a plugin imports from blade's public surface")
    _check_light(module.__name__)


def source_files(module: ModuleType) -> list[Path]:
    """The module's file, or all files of its package."""
    if hasattr(module, "__path__"):
        return sorted(path for folder in module.__path__ for path in Path(folder).rglob("*.py"))
    return [Path(module.__file__)] if module.__file__ else []


def imported(path: Path) -> list[str]:
    """Dotted names of what a source file imports from blade, anywhere in it: "blade.nn", "blade.Sequence"."""
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return [name for name in names if name.split(".")[0] == "blade"]


def is_public(name: str) -> bool:
    in_module = any(f"{name}.".startswith(f"{module}.") for module in PUBLIC)
    return in_module or name == "blade" or name.removeprefix("blade.") in blade.__all__


def _check_commands(plugins: Plugins) -> None:
    from cyclopts import App

    plugins.register_commands(App())


def _check_light(name: str) -> None:
    code = f"import sys, {name}; print(*[m for m in {HEAVY} if m in sys.modules])"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    require(result.returncode == 0, f"importing {name} fails: {result.stderr.strip()}")
    require(not result.stdout.strip(), f"importing {name} also imports {result.stdout.strip()}")
