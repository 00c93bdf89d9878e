"""Checkpoints of torchao (`quant_method` "torchao") in safetensors: integers of 1 to 8 bits, and 8-bit floats."""

from typing import Any

from blade import hookimpl


@hookimpl
def register_quantizations(register: Any) -> None:
    register("torchao", make_torchao)


def make_torchao(config: dict[str, Any]) -> Any:
    from blade_torchao.torchao import TorchAO

    return TorchAO(config)
