"""Checkpoints in 8-bit floats (`quant_method` "fp8" and "fbgemm_fp8")."""

from typing import Any

from blade import hookimpl


@hookimpl
def register_quantizations(register: Any) -> None:
    register("fp8", make_fp8)
    register("fbgemm_fp8", make_fp8)


def make_fp8(config: dict[str, Any]) -> Any:
    from blade_fp8.fp8 import FP8

    return FP8(config)
