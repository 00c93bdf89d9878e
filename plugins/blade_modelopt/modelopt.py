"""contracts.Quantization of NVIDIA's Model Optimizer: FP8 with a scale per matrix, NVFP4 with one per 16 numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from blade import CheckpointError
from blade.nn import GroupedQuantization, Matrix
from blade.nn.format_settings import read_settings, unserved
from blade.nn.small_floats import FP8, float8_matrix, float8_weight, fp4_matrix, fp4_weight, one_number

if TYPE_CHECKING:
    from collections.abc import Mapping

    from blade import QuantizedWeight
    from blade.contracts import Weights

KNOWN = {
    "quant_algo",
    "config_groups",
    "ignore",
    "exclude_modules",
    "kv_cache_scheme",
    "kv_cache_quant_algo",
    "group_size",
}
ALGORITHMS = ("FP8", "NVFP4", "MIXED_PRECISION")
NVFP4_GROUP = 16
WHOLE = 1 << 40  # rows or columns: all there are


class ModelOpt(GroupedQuantization):
    """How a module is quantised is seen from its tensors."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        keys = read_settings(settings, KNOWN, {"group_size": (NVFP4_GROUP,)})
        algorithm = keys.text("quant_algo")
        if algorithm not in ALGORITHMS:
            raise unserved("quantization_config.quant_algo", algorithm)
        self.label = f"modelopt, {algorithm}"

    def matrix(self, prefix: str, weights: Weights) -> Matrix | None:
        name, scales = f"{prefix}.weight", f"{prefix}.weight_scale"
        dtype = weights.get(name).dtype
        if dtype.itemsize > 1:
            return None
        if scales not in weights.names():
            raise CheckpointError(f"The checkpoint has no tensor {scales}, without which {name} means nothing.")
        return float8_matrix(name, weights, scales) if dtype is FP8 else fp4_matrix(name, weights, NVFP4_GROUP)

    def weight(self, prefix: str, weights: Weights) -> QuantizedWeight:
        name, scales = f"{prefix}.weight", f"{prefix}.weight_scale"
        if weights.get(name).dtype is FP8:
            single = weights.shape(scales) in ((), (1,), (1, 1))
            return float8_weight(name, weights, scales, (WHOLE if single else 1, WHOLE))
        return fp4_weight(name, weights, scales, NVFP4_GROUP, one_number(f"{prefix}.weight_scale_2", weights))
