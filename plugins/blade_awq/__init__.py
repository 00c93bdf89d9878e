"""AWQ checkpoints (`quant_method` "awq"), as AutoAWQ writes them."""

from typing import Any

from blade import hookimpl


@hookimpl
def register_quantizations(register: Any) -> None:
    register("awq", make_awq)


def make_awq(config: dict[str, Any]) -> Any:
    from blade_awq.awq import AWQ

    return AWQ(config)
