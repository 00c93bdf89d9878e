"""Checkpoints of llm-compressor (`quant_method` "compressed-tensors")."""

from typing import Any

from blade import hookimpl


@hookimpl
def register_quantizations(register: Any) -> None:
    register("compressed-tensors", make_compressed_tensors)


def make_compressed_tensors(config: dict[str, Any]) -> Any:
    from blade_compressed_tensors.quantization import CompressedTensors

    return CompressedTensors(config)
