"""Checkpoints of HQQ (`quant_method` "hqq"): integers of 1, 2, 4 or 8 bits with zeros that are numbers."""

from typing import Any

from blade import hookimpl


@hookimpl
def register_quantizations(register: Any) -> None:
    register("hqq", make_hqq)


def make_hqq(config: dict[str, Any]) -> Any:
    from blade_hqq.hqq import HQQ

    return HQQ(config)
