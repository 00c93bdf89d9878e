"""Checkpoints of NVIDIA's Model Optimizer (`quant_method` "modelopt"): FP8 and NVFP4."""

from typing import Any

from blade import hookimpl


@hookimpl
def register_quantizations(register: Any) -> None:
    register("modelopt", make_modelopt)


def make_modelopt(config: dict[str, Any]) -> Any:
    from blade_modelopt.modelopt import ModelOpt

    return ModelOpt(config)
