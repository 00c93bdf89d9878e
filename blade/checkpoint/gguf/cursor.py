"""Reading the values of a GGUF header, one after the other, with every length checked against the file's size."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, NoReturn

from blade.errors import CheckpointError

if TYPE_CHECKING:
    from mmap import mmap
    from pathlib import Path

_MAX_DEPTH = 4  # of arrays within arrays
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_read_length = struct.Struct("<Q").unpack_from


class Cursor:
    """Moves forward through a mapped file and never beyond its end; CheckpointError instead."""

    def __init__(self, path: Path, memory: mmap) -> None:
        self.path = path
        self.memory = memory
        self.position = 0

    def fail(self, detail: str) -> NoReturn:
        raise CheckpointError(f"{self.path} is not a sound GGUF file: {detail}.", "Fetch it again.")

    def require(self, num_bytes: int) -> None:
        if num_bytes > len(self.memory) - self.position:
            self.fail(f"it is truncated, its header goes on beyond its {len(self.memory)} bytes")

    def uint32(self) -> int:
        return int(self._scalars("I", 1)[0])

    def uint64(self) -> int:
        return int(self._scalars("Q", 1)[0])

    def string(self) -> str:
        return self.strings(1)[0]

    def strings(self, count: int) -> list[str]:
        """The hot loop: a vocabulary and its merges are 300,000 strings. Slices of the map end where the file ends,
        so a length beyond it shows at the next string or in the check at the end."""
        self.require(8 * count)
        memory, position, strings = self.memory, self.position, []
        try:
            for _ in range(count):
                start = position + 8
                position = start + _read_length(memory, position)[0]
                strings.append(memory[start:position].decode())
        except UnicodeDecodeError:
            self.fail(f"the text at byte {start} is not UTF-8")
        except (struct.error, OverflowError):
            position = len(memory) + 1
        self.position = position
        self.require(0)
        return strings

    def value(self, type_id: int, depth: int = 0) -> Any:
        """A metadata value as str, int, float, bool or a list of them."""
        if type_id == _STRING:
            return self.string()
        if type_id == _ARRAY:
            return self._array(depth)
        return self._scalars(self._code(type_id), 1)[0]

    def _array(self, depth: int) -> list[Any]:
        type_id, count = self.uint32(), self.uint64()
        if type_id == _STRING:
            return self.strings(count)
        if type_id != _ARRAY:
            return list(self._scalars(self._code(type_id), count))
        if depth == _MAX_DEPTH:
            self.fail(f"its arrays are nested more than {_MAX_DEPTH} deep")
        self.require(count)
        return [self._array(depth + 1) for _ in range(count)]

    def _code(self, type_id: int) -> str:
        return _SCALARS.get(type_id) or self.fail(f"it has a value of the unknown type {type_id}")

    def _scalars(self, code: str, count: int) -> tuple[Any, ...]:
        self.require(count)  # before struct is asked for a layout of that many
        layout = struct.Struct(f"<{count}{code}")
        self.require(layout.size)
        values = layout.unpack_from(self.memory, self.position)
        self.position += layout.size
        return values
