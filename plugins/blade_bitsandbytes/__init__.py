"""Checkpoints of bitsandbytes (`quant_method` "bitsandbytes"): 4 bits by NF4 or FP4, or 8."""

from typing import Any

from blade import hookimpl


@hookimpl
def register_quantizations(register: Any) -> None:
    register("bitsandbytes", make_bitsandbytes)


def make_bitsandbytes(config: dict[str, Any]) -> Any:
    from blade_bitsandbytes.bitsandbytes import BitsAndBytes

    return BitsAndBytes(config)
