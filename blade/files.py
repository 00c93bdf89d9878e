"""Small files of a checkpoint, which come from anywhere: only what is a file is opened, and no more read than a file of
its kind can have. A pipe would have its reader wait for ever, and a device never end."""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING

from blade.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

MOST = 1 << 27  # bytes; a large vocabulary takes 4 % of that


def is_file(path: Path) -> bool:
    """Where Path.is_file would raise OSError, as for a name longer than any file's, False."""
    try:
        return path.is_file()
    except OSError:
        return False


def check_file(path: Path) -> int:
    """Bytes of a file. Raises CheckpointError where there is none, or something else."""
    try:
        found = path.stat()
    except (OSError, ValueError) as error:  # ValueError: a name that no file has
        raise CheckpointError(f"{path} cannot be read: {getattr(error, 'strerror', error)}.") from None
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"{path} is no file.", "Fetch the model again.")
    return found.st_size


def read_file(path: Path) -> bytes:
    """Raises CheckpointError where it is no file, of more than MOST bytes, or cannot be read."""
    size = check_file(path)
    if size > MOST:
        raise CheckpointError(
            f"{path} has {size} bytes, of which blade reads {MOST} at most.", "Fetch the model again."
        )
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from None
