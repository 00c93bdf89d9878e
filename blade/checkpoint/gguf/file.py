"""Reading GGUF files (versions 2 and 3, little-endian) without trusting them.

Layout after https://github.com/ggml-org/ggml/blob/master/docs/gguf.md: magic, version, counts, key-value pairs, tensor
infos, padding, tensor data. The reader of the `gguf` package makes numpy arrays of each string of a vocabulary and
takes seconds where this one takes a tenth of one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from enum import IntEnum
from math import prod
from typing import TYPE_CHECKING, Any

from blade.checkpoint.extents import check_extents
from blade.checkpoint.gguf.cursor import Cursor
from blade.checkpoint.lfs import refuse_pointer
from blade.checkpoint.mapping import map_file
from blade.errors import CheckpointError

if TYPE_CHECKING:
    import mmap
    from pathlib import Path

_MAX_DIMS = 4
_DEFAULT_ALIGNMENT = 32


class GGMLType(IntEnum):
    """How a tensor's numbers are stored: the types blade reads, by their number in the file."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    IQ4_NL = 20
    IQ4_XS = 23
    BF16 = 30
    TQ1_0 = 34
    TQ2_0 = 35
    MXFP4 = 39
    Q1_0 = 41

    @property
    def block_size(self) -> int:
        """Numbers in one block."""
        return _BLOCKS[self][0]

    @property
    def block_bytes(self) -> int:
        return _BLOCKS[self][1]

    @property
    def bits(self) -> int:
        """That a block's integers are kept in; 0 for plain numbers."""
        return _BLOCKS[self][2]

    @property
    def kept_bytes(self) -> int:
        """Of a block as a GroupedWeight, its integers packed."""
        return self.block_size * self.bits // 8 + _BLOCKS[self][3]


_BLOCKS = {  # numbers, bytes, bits kept, bytes kept of scales and minima
    GGMLType.F32: (1, 4, 0, 4),
    GGMLType.F16: (1, 2, 0, 2),
    GGMLType.BF16: (1, 2, 0, 2),
    GGMLType.Q4_0: (32, 18, 4, 2),
    GGMLType.Q4_1: (32, 20, 4, 4),
    GGMLType.Q5_0: (32, 22, 5, 2),
    GGMLType.Q5_1: (32, 24, 5, 4),
    GGMLType.Q8_0: (32, 34, 8, 2),
    GGMLType.Q2_K: (256, 84, 4, 36),
    GGMLType.Q3_K: (256, 110, 4, 18),
    GGMLType.Q4_K: (256, 144, 4, 20),
    GGMLType.Q5_K: (256, 176, 5, 20),
    GGMLType.Q6_K: (256, 210, 6, 18),
    GGMLType.IQ4_NL: (32, 18, 4, 2),
    GGMLType.IQ4_XS: (256, 136, 4, 10),
    GGMLType.TQ1_0: (256, 54, 4, 4),
    GGMLType.TQ2_0: (256, 66, 4, 4),
    GGMLType.MXFP4: (32, 17, 4, 2),
    GGMLType.Q1_0: (128, 18, 4, 2),
}
_OTHERS = {  # that files have too: numbers from code books of eight or four, and others that blade does not read
    16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S", 22: "IQ2_S", 29: "IQ1_M",
    24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 40: "NVFP4", 42: "Q2_0",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies; all of it is within the file."""

    kind: GGMLType
    shape: tuple[int, ...]  # outermost first, as in torch
    offset: int  # bytes from the start of the file

    @property
    def num_params(self) -> int:
        return prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_params // self.kind.block_size * self.kind.block_bytes

    @property
    def kept_bytes(self) -> int:
        """Of the numbers as a GroupedWeight, its integers packed."""
        return self.num_params // self.kind.block_size * self.kind.kept_bytes


@dataclass(frozen=True, slots=True)
class GGUFFile:
    """A checked header over the mapped file."""

    path: Path
    metadata: dict[str, Any]  # str, int, float, bool, and lists of them
    tensors: dict[str, TensorInfo]  # by GGUF name
    memory: mmap.mmap


def read_gguf(path: Path) -> GGUFFile:
    """Map a GGUF file and parse its header; CheckpointError where it is not sound."""
    memory = map_file(path)
    cursor = Cursor(path, memory)
    refuse_pointer(path, bytes(memory[:64]))
    if memory[:4] != b"GGUF":
        cursor.fail("it does not begin with 'GGUF'")
    cursor.position = 4
    version = cursor.uint32()
    if version not in (2, 3):
        cursor.fail(f"its version is {version}, and blade reads 2 and 3, little-endian")
    num_tensors, num_pairs = cursor.uint64(), cursor.uint64()
    metadata = _read_metadata(cursor, num_pairs)
    tensors = _read_tensors(cursor, num_tensors, metadata.get("general.alignment", _DEFAULT_ALIGNMENT))
    return GGUFFile(path, metadata, tensors, memory)


def read_gguf_parts(path: Path) -> list[GGUFFile]:
    """The file, or all files it was split into (NAME-00001-of-0000N.gguf); the first one holds the metadata."""
    first = read_gguf(path)
    num_parts = first.metadata.get("split.count", 1)
    if type(num_parts) is not int or not 0 <= num_parts < 100_000:
        raise CheckpointError(f"{path}: split.count must be an integer from 0 to 99999, not {num_parts!r:.60}.")
    if num_parts < 2:
        return [first]
    match = re.fullmatch(r"(.+)-00001-of-(\d{5})\.gguf", path.name)
    if match is None or int(match[2]) != num_parts:
        raise CheckpointError(
            f"{path} is a part of a GGUF file split in {num_parts}.",
            f"Give the path of the first, NAME-00001-of-{num_parts!s:0>5}.gguf, with the others beside it.",
        )
    return [
        first,
        *(read_gguf(path.with_name(f"{match[1]}-{i:05}-of-{match[2]}.gguf")) for i in range(2, num_parts + 1)),
    ]


def _read_metadata(cursor: Cursor, num_pairs: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for _ in range(num_pairs):
        key = cursor.string()
        if key in metadata:
            cursor.fail(f"the key {key!r} comes twice")
        metadata[key] = cursor.value(cursor.uint32())
    return metadata


def _read_tensors(cursor: Cursor, num_tensors: int, alignment: Any) -> dict[str, TensorInfo]:
    if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1):
        cursor.fail(f"its general.alignment is {alignment!r}, not a power of two of at least 8")
    infos: dict[str, TensorInfo] = {}
    for _ in range(num_tensors):
        name = cursor.string()
        if name in infos:
            cursor.fail(f"the tensor {name!r} comes twice")
        infos[name] = _read_info(cursor, name, alignment)
    data_start = -(-cursor.position // alignment) * alignment
    infos = {name: replace(info, offset=data_start + info.offset) for name, info in infos.items()}
    extents = {name: (info.offset, info.offset + info.num_bytes) for name, info in infos.items()}
    check_extents(cursor.path, extents, len(cursor.memory))
    return infos


def _read_info(cursor: Cursor, name: str, alignment: int) -> TensorInfo:
    """One tensor info, its offset still relative to the data."""
    num_dims = cursor.uint32()
    if not 1 <= num_dims <= _MAX_DIMS:
        cursor.fail(f"the tensor {name!r} has {num_dims} dimensions")
    shape = tuple(cursor.uint64() for _ in range(num_dims))[::-1]
    type_id, offset = cursor.uint32(), cursor.uint64()
    if type_id not in _BLOCKS:
        raise CheckpointError(
            f"{cursor.path}: the tensor {name!r} is of GGML type {_OTHERS.get(type_id, type_id)}, which blade does not "
            f"read: it reads {', '.join(kind.name for kind in GGMLType)}.",
            "Use another file of the model, for instance the one in IQ4_XS or Q3_K_M.",
        )
    kind = GGMLType(type_id)
    if 0 in shape or shape[-1] % kind.block_size:
        cursor.fail(f"the tensor {name!r} of shape {shape} is no whole number of {kind.name} blocks")
    if offset % alignment:
        cursor.fail(f"the tensor {name!r} is not aligned to {alignment} bytes")
    return TensorInfo(kind, shape, offset)
