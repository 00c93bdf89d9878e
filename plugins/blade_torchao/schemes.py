"""Which matrix has how many bits: `quant_type` of a torchao checkpoint, a configuration object written down.

An object is {"_type": its class, "_data": its fields}, fields that are objects themselves too.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from blade.nn.format_settings import unserved
from blade.nn.module_patterns import ModulePatterns

if TYPE_CHECKING:
    from blade.nn import Keys

PATH = "quantization_config.quant_type"
BY_NAME = ("FqnToConfig", "ModuleFqnToConfig")  # a configuration for each module or pattern
SERVED = (
    "Int4WeightOnlyConfig", "Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig",
    "Int8StaticActivationInt8WeightConfig", "IntxWeightOnlyConfig", "Int8DynamicActivationIntxWeightConfig",
    "Int8DynamicActivationInt4WeightConfig", "Float8WeightOnlyConfig", "Float8DynamicActivationFloat8WeightConfig",
    "Float8StaticActivationFloat8WeightConfig", "Float8DynamicActivationInt4WeightConfig",
)  # fmt: skip
LAYOUTS = {  # that numbers lie in; the others are those of a device's kernels
    "int4_packing_format": ("PLAIN",),
    "intx_packing_format": ("UNPACKED_TO_INT8",),
    "packing_format": ("PLAIN",),
}
INTEGER = re.compile(r"u?int([1-8])")
FLOAT = "float8_e4m3fn"


class Schemes:
    """The bits of integers that lie in bytes, asked by module."""

    def __init__(self, keys: Keys) -> None:
        self.kinds: list[str] = []
        self._exact: dict[str, int] = {}
        self._patterns: ModulePatterns[int] = ModulePatterns("fullmatch")
        self._default = 8
        self._read(keys)

    def bits(self, prefix: str) -> int:
        """As torchao looks them up: the tensor's name, the module's, the first pattern that has either whole."""
        for name in (f"{prefix}.weight", prefix):
            if name in self._exact:
                return self._exact[name]
        return self._patterns.find(f"{prefix}.weight", prefix) or self._default

    def _read(self, keys: Keys) -> None:
        found = keys.values.get("quant_type")
        if isinstance(found, str):  # of old: a name, and no widths beside 8
            self.kinds.append(found)
            return
        kind, fields = _object(keys.section("quant_type").values.get("default"), f"{PATH}.default")
        if kind not in BY_NAME:
            self._default = self._config(kind, fields, f"{PATH}.default")
            return
        for name, config in (fields.get("fqn_to_config") or fields.get("module_fqn_to_config") or {}).items():
            if config is not None:
                path = f"{PATH}.default.{name}"
                self._aim(name, self._config(*_object(config, path), path), path)

    def _config(self, kind: str, fields: dict[str, Any], path: str) -> int:
        """The bits of one configuration, once all that it says is found served."""
        if kind not in SERVED:
            raise unserved(path, kind)
        for key, served in LAYOUTS.items():
            layout = _value(fields.get(key))
            if layout is not None and (not isinstance(layout, str) or layout.upper() not in served):
                raise unserved(f"{path}.{key}", layout)
        name = kind.removesuffix("Config")
        if name not in self.kinds:
            self.kinds.append(name)
        dtype = _value(fields.get("weight_dtype"))
        if dtype in (None, FLOAT):
            return 8
        match = INTEGER.fullmatch(dtype) if isinstance(dtype, str) else None
        if match is None:
            raise unserved(f"{path}.weight_dtype", dtype)
        return int(match[1])

    def _aim(self, name: str, bits: int, path: str) -> None:
        if name == "_default":
            self._default = bits
        elif name.startswith("re:"):
            self._patterns.add(path, name.removeprefix("re:"), bits)
        else:
            self._exact[name] = bits


def _object(found: object, path: str) -> tuple[str, dict[str, Any]]:
    """Its class and fields."""
    kind = found.get("_type") if isinstance(found, dict) else None
    fields = found.get("_data") if isinstance(found, dict) else None
    if not isinstance(kind, str) or not isinstance(fields, dict):
        raise unserved(path, found)
    for key in ("fqn_to_config", "module_fqn_to_config"):
        if not isinstance(fields.get(key) or {}, dict):
            raise unserved(f"{path}.{key}", fields[key])
    return kind, fields


def _value(found: object) -> object:
    """Of a field, which may be written with its class."""
    return found.get("_data") if isinstance(found, dict) else found
