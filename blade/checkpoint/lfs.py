"""What Git leaves in place of a large file where Git LFS is missing: the most usual thing that is no weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blade.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

_START = b"version https://git-lfs"  # https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md


def refuse_pointer(path: Path, start: bytes) -> None:
    """Raise CheckpointError where the file at `path` begins so; `start` has its first 23 bytes or more."""
    if start.startswith(_START):
        raise CheckpointError(
            f"{path} is not the file itself but a pointer of Git LFS.",
            "Install git-lfs and run `git lfs pull` in its folder, or fetch the model by its id.",
        )
