"""The tensors that recurrent layers keep their states in, and their place among the layers' KV."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from blade.types import KVCache, ModelConfig, StateTensor


def state_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Of one slot over all recurrent layers, in a run of `dtype`; 0 for a model without."""
    if config.state is None:
        return 0
    sizes = (prod(tensor.shape) * _dtype(tensor, dtype).itemsize for tensor in config.state.tensors)
    return len(config.state.layers) * sum(sizes)


def with_states(kv: Seq[Any], config: ModelConfig, num_slots: int, dtype: torch.dtype, device: torch.device) -> KVCache:
    """What the model's forward gets: `kv` of its layers with attention, and states for the others."""
    if config.state is None:
        return kv
    layers, attention = set(config.state.layers), iter(kv)
    return [
        tuple(
            torch.zeros(num_slots, *tensor.shape, dtype=_dtype(tensor, dtype), device=device)
            for tensor in config.state.tensors
        )
        if layer in layers
        else next(attention)
        for layer in range(config.num_layers)
    ]


def _dtype(tensor: StateTensor, dtype: torch.dtype) -> torch.dtype:
    named: torch.dtype = dtype if tensor.dtype is None else getattr(torch, tensor.dtype)
    return named
