"""Files mapped into memory: what is touched is read, and stays until it is let go of."""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING

from blade.errors import CheckpointError
from blade.files import check_file

if TYPE_CHECKING:
    from pathlib import Path


def map_file(path: Path) -> mmap.mmap:
    """The mapping is private: writing to a tensor in it never reaches the file. CheckpointError where it cannot be."""
    check_file(path)
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except ValueError:
        raise CheckpointError(f"{path} is empty.") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from None


def let_go(memory: mmap.mmap, start: int, stop: int) -> None:
    """Have the whole pages of [start, stop) leave this process: they come from the file again when they are touched."""
    start += -start % mmap.PAGESIZE
    length = (stop - start) // mmap.PAGESIZE * mmap.PAGESIZE
    if length > 0 and hasattr(mmap, "MADV_DONTNEED"):
        memory.madvise(mmap.MADV_DONTNEED, start, length)
