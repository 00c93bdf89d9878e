"""Writing safetensors whose tensors are known before their numbers: in any order, each straight to its place.

Layout after https://huggingface.co/docs/safetensors: 8 bytes of header length, a JSON header, the data.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

MAX_BYTES = 5_000_000_000  # of a file, unless one tensor takes more
CODES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int64: "I64", torch.int32: "I32",
    torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Planned:
    """A tensor that will be written."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class ShardWriter:
    """The files of a checkpoint in a folder: made at once, filled by `put`, finished by `close`."""

    def __init__(self, folder: Path, plan: Mapping[str, Planned], max_bytes: int = MAX_BYTES) -> None:
        self._plan = dict(plan)
        self._places: dict[str, tuple[Path, int]] = {}  # file, and the byte where the tensor starts
        shards = _share_out(self._plan, max_bytes)
        files = dict(zip(_file_names(len(shards)), shards, strict=True))
        for file, names in files.items():
            self._make(folder / file, names)
        if len(files) > 1:
            index = {
                "metadata": {"total_size": self.num_bytes},
                "weight_map": {name: file for file, names in files.items() for name in sorted(names)},
            }
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        self._missing = set(self._plan)

    @property
    def num_bytes(self) -> int:
        return sum(planned.num_bytes for planned in self._plan.values())

    def put(self, name: str, tensor: Tensor) -> None:
        """Once for each tensor of the plan, which it has to fit."""
        planned = self._plan[name]
        if name not in self._missing or (planned.dtype, planned.shape) != (tensor.dtype, tuple(tensor.shape)):
            raise ValueError(f"{name} is not to be written as {tensor.dtype} {tuple(tensor.shape)} now")
        path, start = self._places[name]
        with path.open("r+b") as file:
            file.seek(start)
            if tensor.numel():
                file.write(tensor.contiguous().cpu().view(-1).view(torch.uint8).numpy().data)
        self._missing.discard(name)

    def close(self) -> None:
        """Raises ValueError for a tensor that was not put."""
        if self._missing:
            raise ValueError(f"{min(self._missing)} was never written")

    def _make(self, path: Path, names: list[str]) -> None:
        """Wide numbers first, so that all lie at multiples of their size."""
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        starts = {}
        for name in sorted(names, key=lambda name: (-self._plan[name].dtype.itemsize, name)):
            planned = self._plan[name]
            starts[name], end = end, end + planned.num_bytes
            offsets = [starts[name], end]
            header[name] = {"dtype": CODES[planned.dtype], "shape": list(planned.shape), "data_offsets": offsets}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
        for name, start in starts.items():
            self._places[name] = (path, 8 + len(text) + start)


def _share_out(plan: Mapping[str, Planned], max_bytes: int) -> list[list[str]]:
    """In the plan's order."""
    shards: list[list[str]] = [[]]
    held = 0
    for name, planned in plan.items():
        if shards[-1] and held + planned.num_bytes > max_bytes:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += planned.num_bytes
    return shards


def _file_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
