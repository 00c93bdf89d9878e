"""A third party's distribution, really installed: found, not imported until named, then serving."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

TOY = Path(__file__).parent / "toy"
BLADE = """
import sys
from blade.cli import main
try:
    main()
finally:
    print("toy imported:", "blade_toy" in sys.modules, file=sys.stderr, flush=True)
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the toy pip-installed into it, offline, by the setuptools that torch depends on."""
    work = tmp_path_factory.mktemp("toy")
    shutil.copytree(TOY, work / "source")  # pip builds in the source tree
    offline = ["--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", *offline, "--target", work / "site", work / "source"]
    subprocess.run(command, check=True, timeout=100)
    return work / "site"


def environment(site: Path, plugins: str = "") -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": path, "BLADE_PLUGINS": plugins, "OMP_NUM_THREADS": "1"}


def blade(site: Path, *args: str, plugins: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", BLADE, *args]
    return subprocess.run(command, env=environment(site, plugins), capture_output=True, text=True, timeout=60)


def test_it_is_listed_without_being_imported(site: Path) -> None:
    result = blade(site, "plugins")
    assert "toy\tblade-toy 1.0\tthird-party\tnot loaded" in result.stdout.splitlines()
    assert result.stderr == "toy imported: False\n"


def test_its_hooks_are_listed_once_it_is_named(site: Path) -> None:
    result = blade(site, "plugins", "--plugin", "toy")
    (line,) = (line for line in result.stdout.splitlines() if line.startswith("toy\t"))
    assert "register_schedulers" in line
    assert "register_routes" in line
    assert result.stderr == "toy imported: True\n"


def test_its_command_runs(site: Path) -> None:
    result = blade(site, "greet", "you", plugins="toy")
    assert (result.returncode, result.stdout) == (0, "hello you\n")


def test_its_command_is_unknown_until_it_is_named(site: Path) -> None:
    result = blade(site, "greet", "you")
    assert result.returncode == 2
    assert "toy imported: False" in result.stderr


def test_it_passes_the_kit(site: Path) -> None:
    code = "import blade_toy, blade.testing as t; t.check_plugin(blade_toy); t.check_scheduler(blade_toy.Lifo)"
    subprocess.run([sys.executable, "-c", code], env=environment(site), check=True, timeout=60)


@pytest.fixture(scope="module")
def url(site: Path, tiny_llama: Path) -> Iterator[str]:
    """A server with the toy's scheduler, drafter and route."""
    options = ["--plugin", "toy", "--scheduler", "lifo", "--drafter", "repeat", "--port", "0", "--dtype", "float32"]
    command = [sys.executable, "-c", BLADE, "serve", "--model", str(tiny_llama), *options]
    with subprocess.Popen(
        command, env=environment(site), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as server:
        assert server.stdout is not None
        lines = []
        for line in server.stdout:
            lines.append(line)
            if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                yield found[0]
                break
        else:
            pytest.fail("the server did not start:\n" + "".join(lines))
        server.send_signal(signal.SIGTERM)
        server.stdout.read()


def get(url: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.load(response)


def test_it_serves_a_scheduler_and_a_route(url: str) -> None:
    before = get(f"{url}/toy/steps")["steps"]
    reply = get(f"{url}/v1/completions", {"prompt": "hello", "max_tokens": 8, "temperature": 0, "ignore_eos": True})
    assert reply["usage"]["completion_tokens"] == 8
    assert get(f"{url}/toy/steps")["steps"] > before
