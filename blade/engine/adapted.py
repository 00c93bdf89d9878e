"""Steps in which some or all sequences have a LoRA adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence as Seq

    from torch import Tensor

    from blade.contracts import Model, Ops
    from blade.nn.lora import Adapters
    from blade.types import Batch, CaptureOptions, KVCache


class AdaptedForward:
    """The model's forward with adapters. A step in which all have the same one is replayed like any other, each adapter
    from captures of its own; what is captured would know nothing of how a mixed step is mixed, so that one is not.
    Nor is one of an adapter that is more than updates of linears, nor any where captures are made beforehand, for
    batches that are padded, as on a GPU."""

    def __init__(self, model: Model, kv: KVCache, ops: Ops, options: CaptureOptions, adapters: Adapters) -> None:
        self._model, self._kv, self._ops, self._options, self._adapters = model, kv, ops, options, adapters
        self._forwards: WeakKeyDictionary[Any, Callable[[Batch], Tensor]] = WeakKeyDictionary()

    def __call__(self, batch: Batch, tokens: Seq[Any], rows: Seq[Any]) -> Tensor:
        """`tokens`, `rows`: the adapters of the batch's tokens and of its rows of logits, None for none."""
        with self._adapters.chosen(tokens, rows):
            return self._forward(tokens)(batch)

    def _forward(self, tokens: Seq[Any]) -> Callable[[Batch], Tensor]:
        adapter = tokens[0]
        plain = adapter is None or adapter.replayable
        if self._ops.device.type != "cpu" or not plain or any(other is not adapter for other in tokens):
            return lambda batch: self._model.forward(batch, self._kv)
        if adapter not in self._forwards:
            self._forwards[adapter] = self._ops.capture(self._model, self._kv, self._options)
        return self._forwards[adapter]
