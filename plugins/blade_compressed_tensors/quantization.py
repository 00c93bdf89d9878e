"""contracts.Quantization of compressed-tensors: integers and floats of several widths, by group of modules."""

from __future__ import annotations

import logging
from collections import Counter
from typing import TYPE_CHECKING, Any

from blade import CheckpointError
from blade.nn import GroupedQuantization, Matrix
from blade.nn.format_settings import read_settings, unserved
from blade.nn.small_floats import float8_matrix, float8_weight, fp4_matrix, fp4_weight, one_number
from blade_compressed_tensors.integers import integer_matrix, integer_weight
from blade_compressed_tensors.schemes import PACKED, Scheme, Schemes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from blade import QuantizedWeight
    from blade.contracts import Weights

log = logging.getLogger("blade.formats")
FIXED: dict[str, Any] = {
    "transform_config": ({},),  # rotations that activations would need too
    "quantization_status": ("compressed", "frozen"),
}
KNOWN = {"config_groups", "format", "global_compression_ratio", "ignore", "kv_cache_scheme", "sparsity_config"}
WHOLE = 1 << 40  # rows or columns: all there are


class CompressedTensors(GroupedQuantization):
    """Which modules stay plain is seen from their tensors, so that `ignore` need not be read."""

    tensors = ("weight_packed", "weight")

    def __init__(self, settings: Mapping[str, Any]) -> None:
        keys = read_settings(settings, KNOWN, FIXED)
        if keys.section("sparsity_config").text("format", "dense") != "dense":
            raise unserved("quantization_config.sparsity_config.format", "sparse")
        if keys.has("kv_cache_scheme"):
            log.warning("config.json: kv_cache_scheme is not used: see --kv-cache-quant")
        self._schemes = Schemes(keys, settings)
        kinds = Counter(scheme.description for scheme in self._schemes.all)
        self.label = f"compressed-tensors, {' and '.join(kinds)}"

    def matrix(self, prefix: str, weights: Weights) -> Matrix | None:
        packed, names = f"{prefix}.weight_packed", weights.names()
        if packed not in names and f"{prefix}.weight_scale" not in names:
            if weights.get(f"{prefix}.weight").dtype.itemsize == 1:
                raise CheckpointError(
                    f"The checkpoint has no tensor {prefix}.weight_scale, without which {prefix}.weight means nothing."
                )
            return None
        scheme = self._scheme(prefix, packed in names)
        if scheme.type == "int":
            return integer_matrix(prefix, weights, scheme)
        if scheme.format in PACKED:
            return fp4_matrix(packed, weights, scheme.group)
        return float8_matrix(f"{prefix}.weight", weights, f"{prefix}.weight_scale")

    def weight(self, prefix: str, weights: Weights) -> QuantizedWeight:
        packed, scales = f"{prefix}.weight_packed", f"{prefix}.weight_scale"
        scheme = self._scheme(prefix, packed in weights.names())
        if scheme.type == "int":
            return integer_weight(prefix, weights, scheme)
        if scheme.format in PACKED:
            whole = f"{prefix}.weight_global_scale"
            factor = 1 / one_number(whole, weights) if scheme.format == "nvfp4-pack-quantized" else 1.0
            return fp4_weight(packed, weights, scales, scheme.group, factor)
        return float8_weight(f"{prefix}.weight", weights, scales, _block(scheme))

    def _scheme(self, prefix: str, packed: bool) -> Scheme:
        scheme = self._schemes.of(prefix)
        if (scheme.format in PACKED) is not packed:
            there = "weight_packed" if packed else "weight"
            raise CheckpointError(
                f"Tensor {prefix}.{there} is none of the format {scheme.format}, which config.json has for it."
            )
        return scheme


def _block(scheme: Scheme) -> tuple[int, int]:
    """Rows and columns that share a scale."""
    extents = {"tensor": (WHOLE, WHOLE), "channel": (1, WHOLE), "block": scheme.block}
    return extents.get(scheme.extent, (1, scheme.group))
