"""``blade quantize``: round a model's weights and write them as a checkpoint of compressed-tensors."""

from typing import Any

from blade import hookimpl


@hookimpl
def register_commands(cli: Any) -> None:
    from blade_quantize.command import quantize

    cli.command(quantize, name="quantize")
