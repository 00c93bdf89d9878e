"""contracts.Quantization of MLX's mode "affine": w = scale * q + bias, in groups of a row.

Beside `weight`, uint32 [N, K bits / 32] packed along K, lie `scales` and `biases` [N, K / group]; embeddings are
quantised too. Other families' tensors are changed by MLX in more than their precision, so that only those are read that
it leaves as they were.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from blade import CheckpointError, GroupedWeight
from blade.nn import GroupedQuantization, Keys, Matrix
from blade.nn.format_settings import read_settings
from blade.nn.packing import KEPT, checked, checked_scales, matrix_shape, narrow, unpack

if TYPE_CHECKING:
    from collections.abc import Mapping

    from blade.contracts import Weights

FIXED: dict[str, Any] = {"mode": ("affine",), "model_type": ("llama", "qwen2", "qwen3")}
BITS, GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)


class MLX(GroupedQuantization):
    """One width and group for all matrices, unless a module has settings under its own name."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        own = {name: value for name, value in settings.items() if isinstance(value, dict)}
        common = {name: value for name, value in settings.items() if not isinstance(value, dict | bool)}
        bits, group = self._common = _sizes(read_settings(common, {"bits", "group_size"}, FIXED))
        self._own = {
            name: _sizes(Keys({**common, **value}, f"quantization_config.{name}.")) for name, value in own.items()
        }
        kept = "" if KEPT[bits] == bits else f", kept as {KEPT[bits]}"
        self.label = f"mlx, {bits} bits in groups of {group}{' (most of them)' if own else ''}{kept}"

    def matrix(self, prefix: str, weights: Weights) -> Matrix | None:
        if f"{prefix}.scales" not in weights.names():
            return None
        n, k, bits, group = self._shape(prefix, weights)
        return Matrix((n, k), n * k * KEPT[bits] // 8 + 4 * n * (k // group))

    def weight(self, prefix: str, weights: Weights) -> GroupedWeight:
        n, k, bits, group = self._shape(prefix, weights)
        shape = n, -(-k // group)
        words = checked(f"{prefix}.weight", weights, (n, k * bits // 32), torch.uint32, torch.int32)
        scales = checked_scales(f"{prefix}.scales", weights, shape)
        minima = checked_scales(f"{prefix}.biases", weights, shape).half()
        if not bool(minima.isfinite().all()):
            raise CheckpointError(f"Tensor {prefix}.biases holds numbers beyond float16.")
        return GroupedWeight(KEPT[bits], group, unpack(words.view(torch.int32), bits, k), narrow(scales), minima)

    def _shape(self, prefix: str, weights: Weights) -> tuple[int, int, int, int]:
        """N, K, bits and group."""
        bits, group = self._own.get(prefix, self._common)
        n, words = matrix_shape(f"{prefix}.weight", weights)
        k = words * 32 // bits
        if words * 32 % bits or k % group:
            raise CheckpointError(
                f"Tensor {prefix}.weight has {words} words to a row, no groups of {group} x {bits} bits."
            )
        return n, k, bits, group


def _sizes(keys: Keys) -> tuple[int, int]:
    bits, group = keys.integer("bits"), keys.integer("group_size", 64)
    if bits not in BITS:
        keys.refuse("bits", f"one of {', '.join(map(str, BITS))}")
    if group not in GROUPS:
        keys.refuse("group_size", f"one of {', '.join(map(str, GROUPS))}")
    return bits, group
