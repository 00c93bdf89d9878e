"""Reading safetensors. The header is checked here, for messages that name file and tensor; the safetensors library
checks it again and maps the data.

Layout after https://huggingface.co/docs/safetensors: 8 bytes of header length, a JSON header, the data.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from safetensors import SafetensorError, safe_open

from blade.checkpoint.extents import check_extents
from blade.checkpoint.json_file import parse_json, read_json
from blade.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_MAX_HEADER = 100_000_000  # bytes; the format's own limit
_BYTES = dict.fromkeys(("F64", "I64", "U64"), 8) | dict.fromkeys(("F32", "I32", "U32"), 4)
_BYTES |= dict.fromkeys(("F16", "BF16", "I16", "U16"), 2)
_BYTES |= dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "BOOL"), 1)
_Size = Annotated[int, msgspec.Meta(ge=0)]


class TensorHeader(msgspec.Struct, frozen=True):
    """One tensor by the header of its file."""

    dtype: str
    shape: tuple[_Size, ...]
    data_offsets: tuple[_Size, _Size]  # first byte and the one after the last, counted from the end of the header


def read_header(path: Path) -> dict[str, TensorHeader]:
    """The tensors in a file, all of them sound; CheckpointError naming the first that is not."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise CheckpointError(
                    f"{path} is no sound safetensors file: of its {size} bytes the header is to take {length}.",
                    "Fetch it again.",
                )
            entries = parse_json(path, file.read(length))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from None
    entries.pop("__metadata__", None)
    headers = {name: _check(path, name, entry) for name, entry in entries.items()}
    start = 8 + length
    extents = {name: (start + h.data_offsets[0], start + h.data_offsets[1]) for name, h in headers.items()}
    check_extents(path, extents, size)
    return headers


def _check(path: Path, name: str, entry: Any) -> TensorHeader:
    try:
        header = msgspec.convert(entry, TensorHeader)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{path}: the header of the tensor {name!r} is not sound: {error}.") from None
    if header.dtype not in _BYTES:
        raise CheckpointError(
            f"{path}: the tensor {name!r} is of type {header.dtype!r}, which blade does not read.",
            f"Known are {', '.join(_BYTES)}.",
        )
    start, stop = header.data_offsets
    if stop - start != prod(header.shape) * _BYTES[header.dtype]:
        raise CheckpointError(
            f"{path}: the tensor {name!r} of {header.dtype} {list(header.shape)} cannot take {stop - start} bytes."
        )
    return header


class SafetensorsWeights:
    """contracts.Weights over a folder's files, mapped: the bytes of a tensor are read when they are used."""

    def __init__(self, folder: Path) -> None:
        """Of model.safetensors, or else the files its index names, or else all there are."""
        index = _read_index(folder) if _is_sharded(folder) else None
        self._tensors: dict[str, tuple[Path, TensorHeader]] = {}
        for path in weight_files(folder) if index is None else sorted({folder / file for file in index.values()}):
            for name, header in read_header(path).items():
                if index is None or index.get(name) == path.name:
                    self._add(path, name, header)
        for name, file in (index or {}).items():
            if name not in self._tensors:
                raise CheckpointError(f"{folder / file} has no tensor {name!r}, which {INDEX} says it has.")
        self._files = {path: _open(path) for path, _ in self._tensors.values()}

    def _add(self, path: Path, name: str, header: TensorHeader) -> None:
        if name in self._tensors:
            raise CheckpointError(f"The tensor {name!r} is in {self._tensors[name][0]} and again in {path}.")
        self._tensors[name] = (path, header)

    @property
    def num_bytes(self) -> int:
        return sum(h.data_offsets[1] - h.data_offsets[0] for _, h in self._tensors.values())

    @property
    def num_params(self) -> int:
        return sum(prod(h.shape) for _, h in self._tensors.values())

    def names(self) -> Iterable[str]:
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._find(name)[1].shape

    def get(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        path, _ = self._find(name)
        tensor: Tensor = self._files[path].get_tensor(name)
        return tensor if dtype is None else tensor.to(dtype)

    def _find(self, name: str) -> tuple[Path, TensorHeader]:
        if name not in self._tensors:
            raise CheckpointError(f"The checkpoint has no tensor {name!r}.")
        return self._tensors[name]


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder without an index."""
    single = folder / SINGLE
    return [single] if single.exists() else sorted(folder.glob("*.safetensors"))


def _is_sharded(folder: Path) -> bool:
    return (folder / INDEX).exists() and not (folder / SINGLE).exists()


def _read_index(folder: Path) -> dict[str, str]:
    """Which file holds which tensor; all of them beside the index."""
    try:
        index = msgspec.convert(read_json(folder / INDEX).get("weight_map"), dict[str, str])
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{folder / INDEX}: weight_map is not sound: {error}.") from None
    for name, file in index.items():
        if file in ("", ".", "..") or "/" in file or "\\" in file:
            raise CheckpointError(f"{folder / INDEX}: {file!r}, the file of {name!r}, is not in its folder.")
        if not (folder / file).is_file():
            raise CheckpointError(f"{folder} lacks {file}, the file of {name!r} by {INDEX}.", "Fetch it again.")
    return index


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not sound: {error}.", "Fetch it again.") from None
