"""Tensors of another shape than config.json says: found before anything is loaded, and told of with file and fields."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, Any, cast

from blade.checked import text_section
from blade.errors import BladeError, CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from blade.assembly.chosen import Assembly
    from blade.contracts import Architecture
    from blade.nn.lora import Adapters

log = logging.getLogger("blade.assembly")

MAX_NAMED = 3  # fields that may be at fault


def check_shapes(assembly: Assembly, adapters: Adapters | None = None) -> None:
    """Raises CheckpointError where a tensor is missing or of another shape than the model's, a draft model's included;
    no weights are read. Heads that draft are checked while they are loaded alone. `adapters` are told of what they may
    change."""
    from blade.nn.shape_check import ShapeCheck

    draft = assembly.draft
    for each in (assembly, draft) if draft is not None and draft.head is None else (assembly,):
        mine = adapters if each is assembly else None
        loader = ShapeCheck(each.weights, each.ops, each.attention, each.dtype, each.form.quantization, adapters=mine)
        config = replace(each.model_config, max_context=1)  # what depends on it would be computed for nothing
        with explained(each):
            try:
                cast("Architecture", each.architecture).build(config, loader)
            except BladeError:
                raise
            except Exception as error:  # of a plugin that computes with what it loads
                log.info("shapes of %s were not checked: %s", each.model_name, error)


@contextmanager
def explained(assembly: Assembly) -> Iterator[None]:
    """Has errors of shapes name the tensor's file, and the fields of config.json that its own would follow from."""
    from blade.nn.tensors import WrongShape

    checkpoint = assembly.checkpoint
    try:
        yield
    except WrongShape as error:
        file_of = getattr(checkpoint.weights, "file_of", None)
        raise CheckpointError(_sentence(error, file_of and file_of(error.name), checkpoint.config)) from None


def _sentence(error: Any, file: Path | None, config: Mapping[str, Any]) -> str:
    axes = zip(error.found, error.expected, strict=True) if len(error.found) == len(error.expected) else ()
    fields = [field for found, expected in axes if found != expected for field in _fields(config, expected)]
    named = f" ({', '.join(dict.fromkeys(fields))})" if fields else ""
    where = f" in {file.name}" if file else ""
    return f"Tensor {error.name}{where} has shape {error.found}; by config.json{named} it would be {error.expected}."


def _fields(config: Mapping[str, Any], size: int) -> list[str]:
    """The settings that a tensor's size may follow from: one that is as large, or heads times their width."""
    settings = {**config, **text_section(config)}
    sizes = {name: value for name, value in settings.items() if type(value) is int and _is_size(name)}
    found = [f"{name} {value}" for name, value in sizes.items() if value == size]
    heads, widths = ([name for name in sizes if name.endswith(end)] for end in ("heads", "head_dim"))
    pairs = [(heads, width) for heads, width in product(heads, widths) if sizes[heads] * sizes[width] == size]
    return [*(f"{heads} {sizes[heads]} times {width} {sizes[width]}" for heads, width in pairs), *found][:MAX_NAMED]


def _is_size(name: str) -> bool:
    return name.endswith(("_size", "_heads", "head_dim", "_mlp", "num_experts", "num_local_experts"))
