"""The tensors of a GGUF file under their Hugging Face names. Torch is imported when the first is asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable
from collections.abc import Sequence as Seq
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING

from blade.checkpoint.gguf.layouts import Layout
from blade.checkpoint.mapping import let_go
from blade.errors import CheckpointError
from blade.types import GGMLBlocks

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor

    from blade.checkpoint.gguf.file import GGMLType, GGUFFile, TensorInfo
    from blade.types import GroupedWeight

_ROPE_FACTORS = "rope_freqs.weight"


class GGUFWeights:
    """contracts.Weights over the parts of one GGUF model, with what llama.cpp's converter changed undone."""

    def __init__(self, files: Seq[GGUFFile], layout: Layout | None = None) -> None:
        self._layout = layout or Layout()
        self._tensors: dict[str, tuple[GGUFFile, TensorInfo]] = {}
        for file in files:
            for name, info in file.tensors.items():
                self._add(file, name, info)
        self._names = dict.fromkeys(name for name in self._tensors if name != _ROPE_FACTORS)

    def _add(self, file: GGUFFile, name: str, info: TensorInfo) -> None:
        for known, part in self._parts(file, name, info).items():
            if known in self._tensors:
                raise CheckpointError(f"{file.path}: the tensor {name!r} is in another part too.")
            self._tensors[known] = (file, part)

    def _parts(self, file: GGUFFile, name: str, info: TensorInfo) -> dict[str, TensorInfo]:
        """What a tensor is to Hugging Face: itself, or the matrices of a layer's experts."""
        if name == _ROPE_FACTORS:
            return {name: info}
        stacked = len(info.shape) == 3
        names = self._layout.names.hf_names(name, info.shape[0] if stacked else 0)
        if not names:
            raise CheckpointError(f"{file.path}: the tensor {name!r} belongs to no model that blade knows.")
        if not stacked:
            return {names[0]: replace(info, shape=self._layout.shape(names[0], info.shape))}
        num_rows = prod(info.shape[:2])
        if len(names) < info.shape[0] or num_rows % len(names):
            raise CheckpointError(
                f"{file.path}: the tensor {name!r} is of shape {info.shape}, which blade does not know."
            )
        shape, size = (num_rows // len(names), info.shape[2]), info.num_bytes // len(names)
        infos = [replace(info, shape=shape, offset=info.offset + i * size) for i in range(len(names))]
        return dict(zip(names, infos, strict=True))

    @property
    def num_bytes(self) -> int:
        return sum(info.num_bytes for _, info in self._tensors.values())

    @property
    def num_params(self) -> int:
        return sum(info.num_params for _, info in self._tensors.values())

    @property
    def block_formats(self) -> list[str]:
        """Of the matrices that `grouped` gives, the names of their kinds: the one with most numbers first."""
        return [kind.name for kind in self._kinds()]

    @property
    def block_labels(self) -> list[str]:
        """The same, with the bits that a number takes where that is more than it does in the file by a tenth."""
        return [
            f"{kind.name} in {8 * kind.kept_bytes / kind.block_size + 1e-6:.3g} bits"
            if kind.kept_bytes > 1.1 * kind.block_bytes
            else kind.name
            for kind in self._kinds()
        ]

    def _kinds(self) -> list[GGMLType]:
        sizes: Counter[GGMLType] = Counter()
        for name, (_, info) in self._tensors.items():
            if self.grouped_bytes(name) is not None:
                sizes[info.kind] += info.num_params
        return [kind for kind, _ in sizes.most_common()]

    def names(self) -> Collection[str]:
        return self._names.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._find(name)[1].shape

    def file_of(self, name: str) -> Path | None:
        """Where the tensor lies; None where there is none of that name."""
        return self._tensors[name][0].path if name in self._tensors else None

    def get(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Blocks are float32 unless another type is asked for."""
        import torch

        from blade.checkpoint.gguf.dequant import PLAIN_DTYPES, dequantize

        kind, raw = self.raw(name)
        dtype, shape = dtype or PLAIN_DTYPES.get(kind, torch.float32), self.shape(name)
        if self._layout.is_changed(name):
            return self._layout.restored(name, dequantize(kind, raw, torch.float32).view(shape)).to(dtype)
        numbers, columns = dequantize(kind, raw, dtype).view(shape), self._columns(name)
        return numbers if columns is None else torch.empty_like(numbers).index_copy_(-1, columns, numbers)

    def release(self, names: Iterable[str]) -> None:
        """See contracts.Weights."""
        for name in names:
            file, info = self._find(name)
            let_go(file.memory, info.offset, info.offset + info.num_bytes)

    def rope_factors(self) -> list[float] | None:
        """By what each of the rope's frequencies is divided, head_dim / 2 of them; None without rope_freqs.weight."""
        if _ROPE_FACTORS not in self._tensors:
            return None
        factors: list[float] = self.get(_ROPE_FACTORS).flatten().tolist()
        return factors

    def grouped(self, name: str) -> GroupedWeight:
        """A matrix in blocks as the file has it, without loss."""
        from blade.checkpoint.gguf.grouped import grouped

        return replace(grouped(*self.raw(name)), order=self._columns(name))

    def blocks(self, name: str) -> GGMLBlocks:
        """The same in the file's own bytes."""
        from blade.checkpoint.gguf.blocks import VALUES

        kind, raw = self.raw(name)
        n, k = self.shape(name)
        return GGMLBlocks(kind.name, (n, k), raw, VALUES.get(kind), self._columns(name))

    def grouped_bytes(self, name: str) -> int | None:
        """Bytes of what `grouped` gives, its integers packed. None for plain numbers and for what is no matrix."""
        _, info = self._find(name)
        return info.kept_bytes if info.kind.bits and len(info.shape) == 2 else None

    def raw(self, name: str) -> tuple[GGMLType, Tensor]:
        """The tensor as it is stored: [rows, row_bytes] uint8."""
        import torch

        file, info = self._find(name)
        stored = torch.frombuffer(file.memory, dtype=torch.uint8, count=info.num_bytes, offset=info.offset)
        num_rows = info.shape[0]  # of a vector: numbers
        order = self._ordered(name, self._layout.rows, num_rows)
        if order is not None:
            if info.num_bytes % num_rows:
                raise CheckpointError(f"{file.path}: {name} is a vector in blocks, whose numbers cannot be reordered.")
            stored = stored.view(num_rows, -1)[order]
        return info.kind, stored.view(info.num_params // info.shape[-1], -1)

    def _columns(self, name: str) -> Tensor | None:
        return self._ordered(name, self._layout.columns, self.shape(name)[-1])

    def _ordered(self, name: str, order: Callable[[str, int], Tensor | None], num: int) -> Tensor | None:
        try:
            return order(name, num)
        except ValueError as error:
            file, info = self._find(name)
            raise CheckpointError(f"{file.path}: {name}, of shape {info.shape}, {error}.") from None

    def _find(self, name: str) -> tuple[GGUFFile, TensorInfo]:
        if name not in self._tensors:
            raise CheckpointError(f"The checkpoint has no tensor {name!r}.")
        return self._tensors[name]
