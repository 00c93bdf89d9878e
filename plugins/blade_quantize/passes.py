"""One pass of whole sequences through a model that its own architecture builds, whatever a linear does meanwhile."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any, cast

import torch

from blade import Batch, CheckpointError
from blade.nn import DefaultOps
from blade_quantize.attention import WholeAttention
from blade_quantize.stack import Head, make_stack

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence as Seq

    from torch import Tensor

    from blade.contracts import Attention, Experts, Linear, Model, OpenedModel, Ops, Weights
    from blade_quantize.stack import Stack

HEADS = ("lm_head", "embed_tokens")


class PassOps:
    """The device's op set, with mixtures of experts made of any linears."""

    def __init__(self, ops: Ops) -> None:
        self._ops = ops

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)

    def experts(self, gate_up: Seq[Linear], down: Seq[Linear]) -> Experts:
        return DefaultOps.experts(cast("DefaultOps", self), gate_up, down)


class PassLoader:
    """contracts.Loader: `linear` of each stack but the output head's, float32 for the rest."""

    dtype = torch.float32

    def __init__(self, opened: OpenedModel, weights: Weights, linear: Callable[[Stack], Linear]) -> None:
        self.ops = cast("Ops", PassOps(opened.ops))
        self.attention: Attention = WholeAttention()
        self.head = Head()
        self.head_prefix = ""
        self._weights, self._linear = weights, linear
        self._names = frozenset(weights.names())

    def has(self, name: str) -> bool:
        return name in self._names

    def tensor(self, name: str, shape: tuple[int, ...] | None = None, dtype: torch.dtype | None = None) -> Tensor:
        if name not in self._names:
            raise CheckpointError(f"The checkpoint has no tensor {name}.")
        found = tuple(self._weights.shape(name))
        if shape is not None and found != shape:
            raise CheckpointError(f"Tensor {name} has shape {found}; by config.json it would be {shape}.")
        return self.ops.to_device(self._weights.get(name).to(dtype or self.dtype, copy=True))

    def linear(
        self,
        *prefixes: str,
        shapes: Seq[tuple[int, int]] | None = None,
        order: Tensor | None = None,
        known_as: tuple[str, Tensor] | None = None,
    ) -> Linear:
        stack = make_stack(prefixes, shapes, self._weights, self.ops.device, order)
        if prefixes[0].rpartition(".")[2] in HEADS:
            self.head_prefix = prefixes[0]
            return self.head
        return self._linear(stack)

    def embedding(
        self, prefix: str, shape: tuple[int, int] | None = None, tied: Linear | None = None
    ) -> Callable[[Tensor], Tensor]:
        def rows(ids: Tensor) -> Tensor:
            table = self._weights.get(f"{prefix}.weight")
            return self.ops.to_device(table[ids.cpu()].to(self.dtype))

        return rows

    def experts(self, prefix: str, gate_up: Seq[Linear], down: Seq[Linear], shape: tuple[int, int]) -> Experts:
        return self.ops.experts(gate_up, down)


def build(opened: OpenedModel, loader: PassLoader, longest: int) -> Model:
    """The model, for sequences of at most `longest` tokens."""
    return opened.architecture.build(replace(opened.model_config, max_context=longest), loader)


@torch.no_grad()
def run(model: Model, samples: Seq[Seq[int]], ops: Ops) -> None:
    """One forward over all tokens of the samples."""
    model.forward(make_batch(samples, ops), layer_states(model, len(samples), ops))


def make_batch(samples: Seq[Seq[int]], ops: Ops) -> Batch:
    """All samples end to end, each from its first token on."""
    lens = [len(sample) for sample in samples]
    ids = [token for sample in samples for token in sample]
    positions = [position for length in lens for position in range(length)]

    def tensor(values: Seq[int], dtype: torch.dtype = torch.int64) -> Tensor:
        return ops.to_device(torch.tensor(values, dtype=dtype))

    return Batch(
        input_ids=tensor(ids),
        positions=tensor(positions),
        slots=tensor(range(len(ids))),
        cu_seqlens=tensor([0, *accumulate(lens)], torch.int32),
        context_lens=tensor(lens, torch.int32),
        block_tables=ops.to_device(torch.zeros(len(lens), 1, dtype=torch.int32)),
        logits_rows=tensor(range(len(ids))),
        query_lens=lens,
        kv_lens=lens,
        state_in=tensor([-1] * len(lens), torch.int32),
        state_out=tensor(range(len(lens)), torch.int32),
    )


def layer_states(model: Model, num_seqs: int, ops: Ops) -> list[Any]:
    """None for a layer of attention; for a recurrent one a state of each sequence."""
    layers: list[Any] = [None] * model.config.num_layers
    spec: Any = getattr(model.config, "state", None)
    for layer in spec.layers if spec else ():
        layers[layer] = [
            torch.zeros(num_seqs, *each.shape, dtype=getattr(torch, each.dtype or "float32"), device=ops.device)
            for each in spec.tensors
        ]
    return layers
