"""What models keep beside K and V: the states of recurrent layers, and the keys that attention chooses others by."""

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


def index_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Of a token over all layers with KV, in a run of `dtype`; 0 for a model that does not choose keys."""
    selection = config.key_selection
    return config.num_kv_layers * selection.head_dim * dtype.itemsize if selection else 0


def with_index_keys(
    kv: Seq[Any], config: ModelConfig, block_size: int, num_blocks: int, dtype: torch.dtype, device: torch.device
) -> KVCache:
    """`kv` of the layers with attention; of a model that chooses keys each together with those it chooses them by,
    [num_blocks, block_size, head_dim]."""
    selection = config.key_selection
    if selection is None:
        return kv
    shape = num_blocks, block_size, selection.head_dim
    return [(layer_kv, torch.zeros(shape, dtype=dtype, device=device)) for layer_kv in kv]


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
