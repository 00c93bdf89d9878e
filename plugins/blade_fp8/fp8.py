"""contracts.Quantization of 8-bit floats (E4M3) with a scale per block, row or matrix (DeepSeek-AI 2024, Llama 3 Team
2024). Scales of activations are not needed: these keep more bits here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from blade import CheckpointError
from blade.nn import GroupedQuantization, Keys, Matrix
from blade.nn.format_settings import read_settings
from blade.nn.small_floats import FP8 as E4M3
from blade.nn.small_floats import float8_matrix, float8_weight

if TYPE_CHECKING:
    from collections.abc import Mapping

    from blade import Float8Weight
    from blade.contracts import Weights

SCALES = ("weight_scale_inv", "weight_scale")  # both multiply
WHOLE = 1 << 40  # rows or columns: all there are
FIXED: dict[str, Any] = {"fmt": ("e4m3", "float8_e4m3fn"), "scale_fmt": ("ue8m0", "float")}
KNOWN = {
    "weight_block_size", "activation_scheme", "activation_scale_ub", "ignored_layers", "dequantize",
    "weight_per_tensor", "act_per_tensor", "kv_cache_scheme",
}  # fmt: skip


class FP8(GroupedQuantization):
    """Which modules are plain is seen from their tensors."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        keys = read_settings(settings, KNOWN, FIXED)
        self._block = _block(keys)
        what = "blocks of {} by {}".format(*self._block) if self._block else "rows or matrices"
        self.label = f"{settings.get('quant_method', 'fp8')}, a scale for {what}"

    def matrix(self, prefix: str, weights: Weights) -> Matrix | None:
        name = f"{prefix}.weight"
        if weights.get(name).dtype is not E4M3:
            return None
        return float8_matrix(name, weights, self._scales(prefix, weights))

    def weight(self, prefix: str, weights: Weights) -> Float8Weight:
        scales = self._scales(prefix, weights)
        return float8_weight(f"{prefix}.weight", weights, scales, self._extent(weights.shape(scales)))

    def _extent(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Rows and columns that share a scale, by the shape of the scales."""
        if self._block and len(shape) == 2:
            return self._block
        single = all(size == 1 for size in shape)
        return (WHOLE, WHOLE) if single else (1, WHOLE)

    def _scales(self, prefix: str, weights: Weights) -> str:
        for name in (f"{prefix}.{scales}" for scales in SCALES):
            if name in weights.names():
                return name
        raise CheckpointError(
            f"The checkpoint has no tensor {prefix}.{SCALES[0]}, without which {prefix}.weight means nothing.",
            "Fetch the whole model.",
        )


def _block(keys: Keys) -> tuple[int, int] | None:
    if not keys.has("weight_block_size"):
        return None
    sizes = keys.sizes("weight_block_size")
    if len(sizes) != 2:
        keys.refuse("weight_block_size", "two integers")
    return sizes[0], sizes[1]
