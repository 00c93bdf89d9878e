"""Quantise plain weights at load, each number to the nearest (``--quantize int8``, ``--quantize int4``)."""

from typing import Any

from blade import hookimpl


@hookimpl
def register_quantizations(register: Any) -> None:
    register("int8", make_int8, plain=True)
    register("int4", make_int4, plain=True)


def make_int8(config: dict[str, Any]) -> Any:
    from blade_rtn.rtn import Int8

    return Int8()


def make_int4(config: dict[str, Any]) -> Any:
    from blade_rtn.rtn import Int4

    return Int4()
