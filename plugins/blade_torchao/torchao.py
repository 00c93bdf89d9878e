"""contracts.Quantization of torchao: a tensor object W comes as plain tensors, `_weight_qdata`, `_weight_scale` and
`_weight_zero_point` (torchao's flattened state dicts, of version 2 of its configurations).

What an object was is seen from its tensors: 8-bit floats; integers in bytes with zero points in bytes; integers of 4
bits, two to a byte, with zero points that are numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from blade import CheckpointError, GroupedWeight
from blade.nn import GroupedQuantization, Matrix
from blade.nn.format_settings import read_settings
from blade.nn.packing import (
    KEPT,
    checked,
    checked_scales,
    grouped_bytes,
    grouped_matrix,
    kept_group,
    matrix_of,
    matrix_shape,
    narrow,
    regroup,
)
from blade.nn.packing import unpack as unpack_bits
from blade.nn.small_floats import FP8, float8_matrix, float8_weight
from blade_torchao.schemes import Schemes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from blade import QuantizedWeight
    from blade.contracts import Weights

KNOWN = {"quant_type", "quant_type_kwargs", "include_input_output_embeddings", "untie_embedding_weights"}
DATA, SCALE, ZERO = "_weight_qdata", "_weight_scale", "_weight_zero_point"
UNSERVED = {  # what else an object may be made of
    "_weight_act_pre_scale": "the activations are to be multiplied by it first",
    "_weight_scale_and_zero": "it is laid out for a GPU's kernels",
    "_weight_per_tensor_scale": "NVFP4 of torchao is not served",
}


class TorchAO(GroupedQuantization):
    """Which modules are plain is seen from their tensors."""

    tensors = (DATA, "weight")

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._schemes = Schemes(read_settings(settings, KNOWN, {}))
        self.label = f"torchao, {' and '.join(self._schemes.kinds) or 'no configuration'}"

    def matrix(self, prefix: str, weights: Weights) -> Matrix | None:
        name = f"{prefix}.{DATA}"
        if name not in weights.names():
            return None
        self._check(prefix, weights)
        if weights.get(name).dtype is FP8:
            return float8_matrix(name, weights, f"{prefix}.{SCALE}")
        if _is_packed(prefix, weights):
            n, k, group = _packed_shape(prefix, weights)
            kept = kept_group(k, group)
            minima = 2 * n * (k // kept) if _zeros_of_packed(prefix, weights, n, k, group) else 0
            return matrix_of(n, k, kept, grouped_bytes(n, k, 4, kept) + minima)
        n, k = matrix_shape(name, weights)
        group = _group(prefix, weights, n, k)
        zeros = self._zeros(prefix, weights) is not None
        return grouped_matrix(n, k, self._bits(prefix), group, zeros)

    def weight(self, prefix: str, weights: Weights) -> QuantizedWeight:
        name, scales = f"{prefix}.{DATA}", f"{prefix}.{SCALE}"
        self._check(prefix, weights)
        if weights.get(name).dtype is FP8:
            return float8_weight(name, weights, scales, _block(name, weights, scales))
        if _is_packed(prefix, weights):
            return _packed_weight(prefix, weights)
        return self._integers(prefix, weights)

    def _integers(self, prefix: str, weights: Weights) -> GroupedWeight:
        """qdata int8 [N, K]; scale [N, groups], [N, 1] or [1, 1]; zero points of the scale's shape."""
        name = f"{prefix}.{DATA}"
        n, k = matrix_shape(name, weights)
        group, bits = _group(prefix, weights, n, k), self._bits(prefix)
        kept = kept_group(k, group)
        q = _unsigned(name, checked(name, weights, (n, k), torch.int8), bits)
        scales = checked_scales(f"{prefix}.{SCALE}", weights, None).expand(n, k // group)
        zeros = self._zeros(prefix, weights)
        if zeros is not None:
            zeros = _unsigned(f"{prefix}.{ZERO}", zeros, bits).expand(n, k // group)
            zeros = regroup(zeros, k, group, kept)
        return GroupedWeight(KEPT[bits], kept, q, narrow(regroup(scales, k, group, kept)), zeros=zeros)

    def _zeros(self, prefix: str, weights: Weights) -> Tensor | None:
        """int8, of the scale's shape; None where all are 0."""
        name = f"{prefix}.{ZERO}"
        if name not in weights.names():
            return None
        zeros = checked(name, weights, tuple(weights.shape(f"{prefix}.{SCALE}")), torch.int8)
        return zeros if bool(zeros.any()) else None

    def _bits(self, prefix: str) -> int:
        return max(2, self._schemes.bits(prefix))

    def _check(self, prefix: str, weights: Weights) -> None:
        """Raise CheckpointError for an object that cannot be served, and for one without scales."""
        names = weights.names()
        for tensor, reason in UNSERVED.items():
            if f"{prefix}.{tensor}" in names:
                raise CheckpointError(
                    f"Tensor {prefix}.{tensor} is not served: {reason}.", "Use the model's unquantised form."
                )
        if f"{prefix}.{SCALE}" not in names:
            raise CheckpointError(
                f"The checkpoint has no tensor {prefix}.{SCALE}, without which {prefix}.{DATA} means nothing."
            )


def _is_packed(prefix: str, weights: Weights) -> bool:
    name = f"{prefix}.{ZERO}"
    return name in weights.names() and weights.get(name).is_floating_point()


def _packed_shape(prefix: str, weights: Weights) -> tuple[int, int, int]:
    """N, K and group of qdata [N, K / 2] with scale [K / group, N]."""
    n, half = matrix_shape(f"{prefix}.{DATA}", weights)
    num_groups, columns = matrix_shape(f"{prefix}.{SCALE}", weights)
    if columns != n or 2 * half % num_groups:
        raise CheckpointError(
            f"Tensor {prefix}.{SCALE} has shape {(num_groups, columns)}, which is none for {n} rows of {2 * half}."
        )
    return n, 2 * half, 2 * half // num_groups


def _packed_weight(prefix: str, weights: Weights) -> GroupedWeight:
    """w = scale * q + zero, q from -8 to 7 as two's complement, the first of two in the low bits."""
    n, k, group = _packed_shape(prefix, weights)
    name = f"{prefix}.{DATA}"
    packed = checked(name, weights, (n, k // 2), torch.int8, torch.uint8).view(torch.uint8)
    kept, q = kept_group(k, group), unpack_bits(packed ^ 0x88, 4, k)  # 8 more
    scales = checked_scales(f"{prefix}.{SCALE}", weights, (k // group, n)).T
    minima = None
    if _zeros_of_packed(prefix, weights, n, k, group):
        zeros = checked_scales(f"{prefix}.{ZERO}", weights, (k // group, n)).T
        minima = regroup(zeros.float() - 8 * scales.float(), k, group, kept).half()
        if not bool(minima.isfinite().all()):
            raise CheckpointError(f"Tensor {prefix}.{ZERO} holds numbers beyond float16.")
    return GroupedWeight(4, kept, q, narrow(regroup(scales, k, group, kept)), minima)


def _zeros_of_packed(prefix: str, weights: Weights, n: int, k: int, group: int) -> bool:
    """Whether they are any but 0."""
    return bool(checked_scales(f"{prefix}.{ZERO}", weights, (k // group, n)).any())


def _group(prefix: str, weights: Weights, n: int, k: int) -> int:
    """Numbers of a row that share a scale, by the scales' shape."""
    rows, num_groups = matrix_shape(f"{prefix}.{SCALE}", weights)
    if rows not in (1, n) or k % num_groups:
        raise CheckpointError(
            f"Tensor {prefix}.{SCALE} has shape {(rows, num_groups)}, which is none for {n} rows of {k}."
        )
    return k // num_groups


def _block(name: str, weights: Weights, scales: str) -> tuple[int, int]:
    """Rows and columns that share a scale: one for all, or as many as the scales' shape says."""
    n, k = matrix_shape(name, weights)
    shape = tuple(weights.shape(scales))
    if all(size == 1 for size in shape):
        return n, k
    rows, columns = shape if len(shape) == 2 else (0, 0)
    if not rows or not columns or n % rows or k % columns:
        raise CheckpointError(f"Tensor {scales} has shape {shape}, which is none for {n} rows of {k}.")
    return n // rows, k // columns


def _unsigned(name: str, x: Tensor, bits: int) -> Tensor:
    """int8 of `bits` each, -2**(bits - 1) for the least -> uint8, 0 standing where GroupedWeight has it."""
    least = 2 ** (bits - 1)
    if bits < 8 and not bool(((x >= -least) & (x < least)).all()):
        raise CheckpointError(f"Tensor {name} holds numbers that {bits} bits cannot.")
    unsigned: Tensor = x.contiguous().view(torch.uint8) + 2 ** (KEPT[bits] - 1)
    return unsigned
