"""GPTQ checkpoints (`quant_method` "gptq"), as AutoGPTQ and GPTQModel write them."""

from typing import Any

from blade import hookimpl


@hookimpl
def register_quantizations(register: Any) -> None:
    register("gptq", make_gptq)


def make_gptq(config: dict[str, Any]) -> Any:
    from blade_gptq.gptq import GPTQ

    return GPTQ(config)
