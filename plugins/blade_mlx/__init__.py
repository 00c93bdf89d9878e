"""Checkpoints of MLX (`quantization` in config.json, no `quant_method`): integers with a scale and a bias per group."""

from typing import Any

from blade import hookimpl


@hookimpl
def register_quantizations(register: Any) -> None:
    register("mlx", make_mlx)


def make_mlx(config: dict[str, Any]) -> Any:
    from blade_mlx.mlx import MLX

    return MLX(config)
