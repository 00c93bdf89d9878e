"""AutoRound checkpoints (`quant_method` "auto-round") in GPTQ's and AWQ's layouts."""

from typing import Any

from blade import hookimpl


@hookimpl
def register_quantizations(register: Any) -> None:
    register("auto-round", make_auto_round)
    register("intel/auto-round", make_auto_round)


def make_auto_round(config: dict[str, Any]) -> Any:
    from blade_auto_round.auto_round import AutoRound

    return AutoRound(config)
