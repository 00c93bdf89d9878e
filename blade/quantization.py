"""Which form the weights are served in: the checkpoint's own, or the one that --quantize asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from blade.checked import text_section
from blade.engine.memory import size
from blade.errors import CheckpointError, ConfigError
from blade.registry import suggest

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from blade.checkpoint.gguf.weights import GGUFWeights
    from blade.checkpoint.open import Checkpoint
    from blade.contracts import Ops, Quantization
    from blade.plugins import Plugins

NONE = "none"  # of --quantize: plain numbers


@dataclass(frozen=True, slots=True)
class WeightForm:
    """A choice, and what to tell of it."""

    quantization: Quantization | None  # None: plain numbers in the run's dtype
    label: str  # for a person: "bfloat16", "int8 by --quantize"


def check_quantize(name: str | None, plugins: Plugins) -> None:
    """Refuse a --quantize that no loaded plugin makes."""
    if name in (None, NONE):
        return
    registry = plugins.registry("register_quantizations")
    makers = [known for known in registry if registry.entry(known).plain]
    if name not in makers:
        raise ConfigError(
            f"--quantize {name}: no loaded plugin makes that of plain weights.", suggest(name, [*makers, NONE])
        )


def choose_form(
    checkpoint: Checkpoint, asked: str | None, ops: Ops, dtype: torch.dtype, plugins: Plugins
) -> WeightForm:
    """Raises CheckpointError where no plugin reads the checkpoint's format, ConfigError where `asked` makes no sense of
    it."""
    settings = quantization_settings(checkpoint.config)
    if settings:
        return _quantized(checkpoint, settings, asked, ops, dtype, plugins)
    if asked not in (None, NONE):
        quantization = plugins.registry("register_quantizations").create(asked, {})
        source = ", made of the file's dequantised blocks" if checkpoint.blocks else ""
        return WeightForm(quantization, f"{asked} by --quantize{source}")
    if checkpoint.blocks:
        return _blocks(checkpoint, checkpoint.blocks, asked, ops, dtype)
    return WeightForm(None, _name(dtype))


def quantization_settings(config: Mapping[str, Any]) -> object:
    """Where config.json says how the weights are quantised: also under the name of old, and beside a text model's own
    settings. MLX names no method; which family it is tells whether its tensors are what they are elsewhere."""
    mlx = config.get("quantization")
    if isinstance(mlx, dict) and "group_size" in mlx:
        return {**mlx, "quant_method": "mlx", "model_type": config.get("model_type")}
    found = config.get("quantization_config") or config.get("compression_config")
    return found or text_section(config).get("quantization_config")


def _quantized(
    checkpoint: Checkpoint, settings: object, asked: str | None, ops: Ops, dtype: torch.dtype, plugins: Plugins
) -> WeightForm:
    """As it is, where that can be."""
    from blade.nn.grouped import Dequantized, GroupedQuantization

    registry = plugins.registry("register_quantizations")
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    readers = sorted(name for name in registry if not registry.entry(name).plain)
    if not isinstance(method, str) or method not in readers:
        wrong = f"is quantised by {method!r}, which no loaded plugin reads"
        raise CheckpointError(
            f"{checkpoint.name} {wrong if method else 'has a quantization_config without quant_method'}.",
            f"Read: {', '.join(readers) or 'none yet'}, and GGUF files. Use the model's unquantised form.",
        )
    quantization = registry.create(method, settings)
    known = isinstance(quantization, GroupedQuantization)
    if asked is not None and not (known and asked == NONE):
        raise ConfigError(
            f"{checkpoint.name} is quantised by {method!r} already, so --quantize {asked} cannot be had of it.",
            f"Leave --quantize out{f', ask for {NONE}' if known else ''}, or use the model's unquantised form.",
        )
    if known and (asked == NONE or dtype not in ops.quantized_dtypes):
        label = _dequantized(checkpoint, asked, ops, dtype, "quantised weights")
        return WeightForm(Dequantized(quantization), label)
    return WeightForm(quantization, getattr(quantization, "label", method))


def _blocks(
    checkpoint: Checkpoint, weights: GGUFWeights, asked: str | None, ops: Ops, dtype: torch.dtype
) -> WeightForm:
    """Of a GGUF file with blocks: as they are, where that can be."""
    from blade.nn.grouped import Stored

    if asked is None and dtype in ops.quantized_dtypes:
        return WeightForm(Stored(weights), f"as in the file ({', '.join(weights.block_labels)})")
    return WeightForm(None, _dequantized(checkpoint, asked, ops, dtype, "blocks"))


def _dequantized(checkpoint: Checkpoint, asked: str | None, ops: Ops, dtype: torch.dtype, what: str) -> str:
    """The label, with the reason."""
    lack = f"the device ({ops.name}) has no kernels for {what} in {_name(dtype)}"
    reason = "as --quantize none asks" if asked else lack
    return f"{_name(dtype)}: dequantised from the file's {size(checkpoint.num_bytes)}, {reason}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
