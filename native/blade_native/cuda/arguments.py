"""From named values to the bytes of a kernel's argument struct, checked: the driver checks nothing."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from blade_native.cuda.source import Field, Signature, template_arguments

DTYPES = {
    "float": torch.float32, "__half": torch.float16, "__nv_bfloat16": torch.bfloat16, "int": torch.int32,
    "long long": torch.int64, "signed char": torch.int8, "unsigned char": torch.uint8, "bool": torch.bool,
    "__nv_fp8_e4m3": torch.float8_e4m3fn, "__nv_fp8_e5m2": torch.float8_e5m2,
}  # fmt: skip
CUDA_NAMES = {dtype: name for name, dtype in DTYPES.items()}  # torch.bfloat16 -> "__nv_bfloat16"
CODES = {"i4": "i", "u4": "I", "i8": "q", "u8": "Q", "f4": "f", "f8": "d", "b1": "?", "i1": "b", "u1": "B"}


class Arguments:
    """What one instantiation of a kernel takes; its template parameters name the dtypes of pointers to them."""

    def __init__(self, kernels: Mapping[str, Signature], expression: str, device: torch.device) -> None:
        """`kernels`: what the source declares; `expression`: "add<float, 4>"."""
        self.kernel, given = template_arguments(expression)
        declared = kernels[self.kernel]
        types: dict[str, torch.dtype | None] = {**DTYPES, **dict.fromkeys(declared.parameters)}
        types.update({name: DTYPES.get(value) for name, value in zip(declared.parameters, given, strict=False)})
        self._layout = declared.layout()
        self._struct = packer(self._layout)
        self._fields = [
            (field.name, self._pointer(field, types.get(field.element), device) if field.element else _as_is)
            for field in declared.fields
        ]

    def pack(self, values: Mapping[str, Any]) -> np.ndarray[Any, np.dtype[np.void]]:
        """The struct as an array of one element, which CuPy passes by value. Raises TypeError for a missing or unknown
        field, a tensor on another device or of another dtype, and a number that does not fit."""
        if len(values) != len(self._fields):
            raise TypeError(f"{self.kernel} takes {[name for name, _ in self._fields]}, not {list(values)}")
        try:
            packed = self._struct.pack(*[convert(values[name]) for name, convert in self._fields])
        except (KeyError, struct.error) as error:
            raise TypeError(f"{self.kernel}: {error} in {dict(values)}") from error
        return np.frombuffer(packed, self._layout)

    def _pointer(self, field: Field, dtype: torch.dtype | None, device: torch.device) -> Callable[[Any], int]:
        def address(tensor: Any) -> int:
            if tensor is None:
                return 0
            if tensor.device != device or (dtype is not None and tensor.dtype != dtype):
                wanted = f"{dtype or 'a tensor'} on {device}"
                raise TypeError(f"{self.kernel}: {field.name} is {tensor.dtype} on {tensor.device}, not {wanted}")
            return int(tensor.data_ptr())

        return address


def _as_is(value: Any) -> Any:
    return value


def packer(layout: np.dtype[np.void]) -> struct.Struct:
    """The layout as a Struct, which packs a launch's arguments ten times as fast as numpy."""
    text, end = "<", 0
    for name in layout.names or ():
        dtype, offset = layout.fields[name][:2]  # type: ignore[index]
        text += f"{offset - end}x{CODES[dtype.str[1:]]}"
        end = offset + dtype.itemsize
    return struct.Struct(f"{text}{layout.itemsize - end}x")
