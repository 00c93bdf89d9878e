"""Checkpoints of more than the model that is served: one that comes with eyes, or with heads to draft with."""

from __future__ import annotations

import logging
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    import torch
    from torch import Tensor

    from blade.contracts import Weights

log = logging.getLogger("blade.checkpoint")


class NamedWeights:
    """contracts.Weights of a checkpoint, those of some names alone."""

    def __init__(self, weights: Weights, names: Iterable[str]) -> None:
        self._weights = weights
        self._names = dict.fromkeys(names)

    def names(self) -> Collection[str]:
        return self._names.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._weights.shape(name)

    def get(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        return self._weights.get(name, dtype)

    def release(self, names: Iterable[str]) -> None:
        self._weights.release(names)


class SelectedWeights(NamedWeights):
    """contracts.Weights without the parts that are none of the model's; the log says which of them there were."""

    def __init__(self, weights: Weights, unread: Mapping[str, str]) -> None:
        """`unread`: how the names of a part's tensors begin, and what the part is."""
        names: list[str] = []
        found: Counter[str] = Counter()
        for name in weights.names():
            part = next((part for start, part in unread.items() if name.startswith(start)), None)
            if part is None:
                names.append(name)
            else:
                found[part] += 1
        if found:
            parts = ", ".join(f"{part} ({n} tensors)" for part, n in found.items())
            log.info("no part of the model that is served: %s", parts)
        super().__init__(weights, names)
