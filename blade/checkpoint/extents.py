"""The check that both file formats share: tensors lie within their file, and apart."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blade.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


def check_extents(path: Path, extents: Mapping[str, tuple[int, int]], size: int) -> None:
    """CheckpointError unless the byte ranges [start, stop) lie within the file's `size` bytes without overlapping."""
    end, previous = 0, ""
    for name, (start, stop) in sorted(extents.items(), key=lambda item: item[1]):
        if stop > size:
            raise CheckpointError(
                f"{path} is truncated: the tensor {name!r} ends at byte {stop} and the file at {size}.",
                "Fetch it again.",
            )
        if start < end:
            raise CheckpointError(
                f"{path} is not sound: the tensors {previous!r} and {name!r} overlap.", "Fetch it again."
            )
        end, previous = stop, name
