"""Reading safetensors without trusting them, and with messages that name file and tensor. The files stay mapped here,
and not in the safetensors library, so that what has been loaded can be let go of.

Layout after https://huggingface.co/docs/safetensors: 8 bytes of header length, a JSON header, the data.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from math import prod
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from blade.checkpoint.extents import check_extents
from blade.checkpoint.json_file import parse_json, read_json
from blade.checkpoint.lfs import refuse_pointer
from blade.checkpoint.mapping import let_go, map_file
from blade.errors import CheckpointError
from blade.files import check_file, is_file

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_MAX_HEADER = 100_000_000  # bytes; the format's own limit
_DTYPES = {  # bytes of a number, and torch's name for the type
    "F64": (8, "float64"), "F32": (4, "float32"), "F16": (2, "float16"), "BF16": (2, "bfloat16"),
    "F8_E4M3": (1, "float8_e4m3fn"), "F8_E5M2": (1, "float8_e5m2"), "F8_E8M0": (1, "float8_e8m0fnu"),
    "I64": (8, "int64"), "I32": (4, "int32"), "I16": (2, "int16"), "I8": (1, "int8"),
    "U64": (8, "uint64"), "U32": (4, "uint32"), "U16": (2, "uint16"), "U8": (1, "uint8"), "BOOL": (1, "bool"),
}  # fmt: skip
_NUMBERS = {"F64", "F32", "F16", "BF16"}  # that mean something by themselves
_Size = Annotated[int, msgspec.Meta(ge=0)]


class TensorHeader(msgspec.Struct, frozen=True):
    """One tensor by the header of its file."""

    dtype: str
    shape: tuple[_Size, ...]
    data_offsets: tuple[_Size, _Size]  # first byte and the one after the last, counted from the end of the header

    @property
    def num_bytes(self) -> int:
        return self.data_offsets[1] - self.data_offsets[0]


def read_header(path: Path) -> tuple[dict[str, TensorHeader], int]:
    """The tensors in a file, all of them sound, and the byte that their offsets count from; CheckpointError naming the
    first that is not."""
    size = check_file(path)
    try:
        with path.open("rb") as file:
            begin = file.read(64)
            refuse_pointer(path, begin)
            length = int.from_bytes(begin[:8], "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise CheckpointError(
                    f"{path} is no sound safetensors file: of its {size} bytes the header is to take {length}.",
                    "Fetch it again.",
                )
            file.seek(8)
            entries = parse_json(path, file.read(length))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from None
    entries.pop("__metadata__", None)
    headers = {name: _check(path, name, entry) for name, entry in entries.items()}
    start = 8 + length
    extents = {name: (start + h.data_offsets[0], start + h.data_offsets[1]) for name, h in headers.items()}
    check_extents(path, extents, size)
    if loose := size - start - sum(header.num_bytes for header in headers.values()):
        raise CheckpointError(f"{path} is not sound: {loose} of its bytes belong to no tensor.", "Fetch it again.")
    return headers, start


def _check(path: Path, name: str, entry: Any) -> TensorHeader:
    try:
        header = msgspec.convert(entry, TensorHeader)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{path}: the header of the tensor {name!r} is not sound: {error}.") from None
    if header.dtype not in _DTYPES:
        raise CheckpointError(
            f"{path}: the tensor {name!r} is of type {header.dtype!r}, which blade does not read.",
            f"Known are {', '.join(_DTYPES)}.",
        )
    start, stop = header.data_offsets
    if stop - start != prod(header.shape) * _DTYPES[header.dtype][0]:
        raise CheckpointError(
            f"{path}: the tensor {name!r} of {header.dtype} {list(header.shape)} cannot take {stop - start} bytes."
        )
    return header


class MappedFile:
    """One file, its header checked: the bytes of a tensor are read when they are used."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.headers, self._start = read_header(path)
        self._memory = map_file(path)

    def tensor(self, header: TensorHeader) -> Tensor:
        import torch

        dtype: torch.dtype = getattr(torch, _DTYPES[header.dtype][1])
        if not header.num_bytes:
            return torch.empty(header.shape, dtype=dtype)
        start = self._start + header.data_offsets[0]
        return torch.frombuffer(self._memory, dtype=dtype, count=prod(header.shape), offset=start).view(header.shape)

    def let_go(self, header: TensorHeader) -> None:
        let_go(self._memory, *(self._start + offset for offset in header.data_offsets))


class SafetensorsWeights:
    """contracts.Weights over a folder's files."""

    def __init__(self, folder: Path) -> None:
        """Of model.safetensors, or else the files its index names, or else all there are."""
        index = _read_index(folder) if _is_sharded(folder) else None
        self._tensors: dict[str, tuple[MappedFile, TensorHeader]] = {}
        for path in weight_files(folder) if index is None else sorted({folder / file for file in index.values()}):
            file = MappedFile(path)
            for name, header in file.headers.items():
                if index is None or index.get(name) == path.name:
                    self._add(file, name, header)
        for name, missing in (index or {}).items():
            if name not in self._tensors:
                raise CheckpointError(f"{folder / missing} has no tensor {name!r}, which {INDEX} says it has.")

    def _add(self, file: MappedFile, name: str, header: TensorHeader) -> None:
        if name in self._tensors:
            first = self._tensors[name][0].path
            raise CheckpointError(f"The tensor {name!r} is in {first} and again in {file.path}.")
        self._tensors[name] = (file, header)

    @property
    def num_bytes(self) -> int:
        return sum(header.num_bytes for _, header in self._tensors.values())

    @property
    def num_params(self) -> int:
        return sum(prod(h.shape) for _, h in self._tensors.values())

    def names(self) -> Collection[str]:
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._find(name)[1].shape

    def file_of(self, name: str) -> Path | None:
        """Where the tensor lies; None where there is none of that name."""
        return self._tensors[name][0].path if name in self._tensors else None

    def get(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        file, header = self._find(name)
        if dtype is not None and dtype.is_floating_point and header.dtype not in _NUMBERS:
            raise CheckpointError(
                f"{file.path}: the tensor {name!r} is of {header.dtype}, which is no plain number.",
                "By config.json it is not quantised: fetch config.json again, or use another form of the model.",
            )
        tensor = file.tensor(header)
        return tensor if dtype is None else tensor.to(dtype)

    def release(self, names: Iterable[str]) -> None:
        for name in names:
            file, header = self._find(name)
            file.let_go(header)

    def _find(self, name: str) -> tuple[MappedFile, TensorHeader]:
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
        if not is_file(folder / file):
            raise CheckpointError(f"{folder} lacks {file}, the file of {name!r} by {INDEX}.", "Fetch it again.")
    return index
