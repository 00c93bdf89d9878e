"""Where a model leaves hidden states for those who read them (see contracts.heads)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blade.contracts.heads import NORMED
from blade.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from torch import Tensor

    from blade.contracts import Ops


class ShownStates:
    """False as long as nobody reads any."""

    def __init__(self, ops: Ops, num_layers: int, width: int) -> None:
        self._ops = ops
        self._num_layers, self._width = num_layers, width
        self._places: dict[int, list[Tensor]] = {}

    def __bool__(self) -> bool:
        return bool(self._places)

    @property
    def of_last_layer(self) -> bool:
        """Whether the last layer has to compute all tokens, not only those whose logits are wanted."""
        return NORMED in self._places or self._num_layers in self._places

    def add(self, states: Seq[int], out: Tensor) -> None:
        """As contracts.ReadableModel.show_hidden."""
        for i, state in enumerate(states):
            if state != NORMED and not 0 <= state <= self._num_layers:
                raise ConfigError(
                    f"A drafter reads the hidden state after {state} layers, and the model has {self._num_layers}.",
                    "Choose a drafter that was made for this model.",
                )
            self._places.setdefault(state, []).append(out[:, i * self._width : (i + 1) * self._width])

    def leave(self, state: int, x: Tensor) -> None:
        """x [T, width] is this hidden state; it may change afterwards."""
        for out in self._places.get(state, ()):
            self._ops.copy_rows(x, out[: len(x)])
