"""The house has floors, imports go down only, and nothing that runs foreign code may move in."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from blade.testing.plugin import HEAVY, is_public

ROOT = Path(__file__).parent.parent
PACKAGES = [ROOT / "blade", *sorted(ROOT.glob("plugins/blade_*")), *sorted(ROOT.glob("native/blade_*"))]
FILES = [path for package in PACKAGES for path in sorted(package.rglob("*.py"))]

FLOORS = (  # from the top; a room imports only from floors below its own
    {"compat_quantize"},
    {"compat", "__main__"},
    {"cli"},
    {"serve"},
    {"banner", "inspection", "opening"},
    {"assembly"},
    {"console", "logs", "quantization"},
    {"testing"},
    {"a plugin"},  # every package blade_*, native ones too: see the law below
    {"the surface"},  # blade/__init__.py
    {"api", "plugins"},
    {"engine", "hookspecs", "registry"},
    {"nn", "text", "checkpoint"},
    {"contracts", "config", "checked", "chunks", "files"},
    {"types", "errors"},
)


def room(module: str) -> str:
    """The room that a dotted name lies in."""
    first, _, rest = module.partition(".")
    if first != "blade":
        return "a plugin"
    child = rest.partition(".")[0]
    return child if child and child in {room for floor in FLOORS for room in floor} else "the surface"


def floor(room: str) -> int:
    return next(level for level, rooms in enumerate(reversed(FLOORS)) if room in rooms)


def module_name(path: Path) -> str:
    """blade/engine/blocks.py -> blade.engine.blocks; the __init__ of a package has the package's name."""
    parts = path.with_suffix("").parts
    start = max(i for i, part in enumerate(parts) if part == "blade" or part.startswith("blade_"))
    return ".".join(parts[start:]).removesuffix(".__init__")


def imports(path: Path) -> Iterator[str]:
    """Dotted names of all that a file imports, at its top, inside functions and for the type checker alone."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: import by full name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def ours(path: Path) -> list[str]:
    return [name for name in imports(path) if name.split(".")[0] == "blade" or name.startswith("blade_")]


def show(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", [path for path in FILES if path.is_relative_to(ROOT / "blade")], ids=show)
def test_imports_go_down(path: Path) -> None:
    here = module_name(path)
    assert here == "blade" or room(here) != "the surface", f"{here} has no floor yet: give it one above"
    for name in ours(path):
        assert room(name) == room(here) or floor(room(name)) < floor(room(here)), f"{here} imports {name}"


@pytest.mark.parametrize("path", [path for path in FILES if not path.is_relative_to(ROOT / "blade")], ids=show)
def test_plugins_live_under_the_law_of_strangers(path: Path) -> None:
    own = module_name(path).split(".")[0]
    foreign = [name for name in ours(path) if not (is_public(name) or name.split(".")[0] == own)]
    assert foreign == []


def offences(tree: ast.AST) -> Iterator[str]:
    """What would run, or let a file run, foreign code."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (name.name for name in names if name.name.split(".")[0] in SERIALIZERS)
            case ast.ImportFrom(module=str(module)) if module.split(".")[0] in SERIALIZERS:
                yield module
            case ast.Call(func=ast.Name(id="eval" | "exec" | "compile" | "__import__" as builtin)):
                yield builtin
            case ast.Attribute(value=ast.Name(id="torch"), attr="load"):
                yield "torch.load"
            case ast.keyword(arg="trust_remote_code" | "allow_pickle" as flag, value=value):
                if not (isinstance(value, ast.Constant) and value.value is False):
                    yield flag


SERIALIZERS = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}


@pytest.mark.parametrize("path", FILES, ids=show)
def test_nothing_runs_foreign_code(path: Path) -> None:
    assert list(offences(ast.parse(path.read_text(encoding="utf-8")))) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from marshal import loads",
        "torch.load(path)",
        "eval('1')",
        "exec(code)",
        "f(trust_remote_code=True)",
        "f(trust_remote_code=flag)",
        "numpy.load(path, allow_pickle=True)",
    ],
)
def test_the_lint_sees(source: str) -> None:
    assert list(offences(ast.parse(source)))


def test_the_lint_lets_pass() -> None:
    assert list(offences(ast.parse("model.eval()\nf(trust_remote_code=False)\njson.load(file)\nre.compile('a')"))) == []


@pytest.mark.parametrize("module", ["blade", "blade.plugins", "blade.testing", "blade.cli"])
def test_importing_is_cheap(module: str) -> None:
    code = f"import sys, {module}; print([name for name in {HEAVY} if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
