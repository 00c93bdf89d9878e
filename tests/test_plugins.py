"""Discovery and loading: what is imported, what is refused, and what the operator is told."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from blade import PluginError
from blade.plugins import load

Install = Callable[..., None]

SCHEDULER = "from blade import hookimpl\n@hookimpl\ndef register_schedulers(register):\n    register({!r}, object)\n"


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """install(distribution, plugin, source): an installed distribution that announces one plugin.

    A distribution called blade-llm stands in for the real one, so that the only built-in is the fake `fcfs`.
    """
    monkeypatch.syspath_prepend(tmp_path)

    def install(distribution: str, plugin: str, source: str) -> None:
        module = distribution.replace("-", "_") + "_module"
        (tmp_path / f"{module}.py").write_text(source)
        info = tmp_path / f"{distribution.replace('-', '_')}-1.5.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.5\n")
        (info / "entry_points.txt").write_text(f"[blade]\n{plugin} = {module}\n")
        monkeypatch.delitem(sys.modules, module, raising=False)

    install("blade-llm", "fcfs", SCHEDULER.format("fcfs"))
    return install


def test_all_that_is_installed_is_listed_and_what_is_not_named_not_imported(install: Install) -> None:
    install("acme-lifo", "lifo", "raise RuntimeError('imported')")
    found = [(i.name, i.distribution, i.version, i.module, i.origin, i.loaded) for i in load().table()]
    assert found == [
        ("fcfs", "blade-llm", "1.5", "blade_llm_module", "built-in", True),
        ("lifo", "acme-lifo", "1.5", "acme_lifo_module", "third-party", False),
    ]


def test_a_third_party_plugin_is_loaded_only_when_named(install: Install) -> None:
    install("acme-lifo", "lifo", SCHEDULER.format("lifo"))
    assert list(load().registry("register_schedulers")) == ["fcfs"]
    assert "acme_lifo_module" not in sys.modules
    assert list(load(["lifo", "lifo", "fcfs"]).registry("register_schedulers")) == ["fcfs", "lifo"]


def test_the_table_tells_hooks_of_loaded_plugins_only(install: Install) -> None:
    install("acme-lifo", "lifo", SCHEDULER.format("lifo"))
    assert [(i.name, i.loaded, i.hooks) for i in load().table()] == [
        ("fcfs", True, ("register_schedulers",)),
        ("lifo", False, None),
    ]
    assert all(info.loaded for info in load(["lifo"]).table())


def test_one_name_claimed_by_two_distributions(install: Install) -> None:
    install("acme-fcfs", "fcfs", "")
    with pytest.raises(PluginError, match=r"'fcfs' is claimed by (?=.*blade-llm)(?=.*acme-fcfs).* Uninstall one"):
        load()


def test_an_unknown_plugin_gets_the_closest_match(install: Install) -> None:
    install("acme-lifo", "lifo", "")
    with pytest.raises(PluginError, match=r"Unknown plugin 'lifp'\. Did you mean 'lifo'\? Known: fcfs, lifo\."):
        load(["lifp"])


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import no_such_library", "ModuleNotFoundError: No module named 'no_such_library'"),
        ("raise ValueError('two\\nlines.')", "ValueError: two lines"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("def f(:", "SyntaxError: "),
    ],
)
def test_a_failed_import_names_plugin_module_and_cause(install: Install, source: str, said: str) -> None:
    install("acme-bad", "bad", source)
    with pytest.raises(PluginError) as caught:
        load(["bad"])
    assert str(caught.value).startswith(f"Plugin 'bad' (acme-bad 1.5) could not import 'acme_bad_module': {said}")
    assert str(caught.value).endswith("Reinstall acme-bad or start without --plugin bad.")


def test_blade_must_be_installed_to_find_its_own_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blade.plugins.metadata.entry_points", lambda group: [])
    with pytest.raises(PluginError, match=r"blade-llm is not installed.*pip install"):
        load()


def test_importing_the_loader_is_cheap() -> None:
    code = "import sys, blade.plugins; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
