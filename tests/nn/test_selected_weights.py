"""What is not served is not seen, and the log says so."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

from blade.nn import SelectedWeights


class Mixed:
    """contracts.Weights of a model with eyes."""

    def names(self) -> Iterable[str]:
        return ["model.norm.weight", "mtp.norm.weight", "model.visual.a", "model.visual.b"]

    def shape(self, name: str) -> tuple[int, ...]:
        return (2,)

    def get(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        return torch.ones(2, dtype=dtype)

    def release(self, names: Iterable[str]) -> None:
        """Nothing is held."""


def test_parts_are_left_out_by_name(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "blade.checkpoint"):
        selected = SelectedWeights(Mixed(), {"model.visual.": "vision", "mtp.": "multi-token prediction"})
    assert list(selected.names()) == ["model.norm.weight"]
    assert "no part of the model that is served: multi-token prediction (1 tensors), vision (2 tensors)" in caplog.text
    assert selected.get("model.norm.weight", torch.float16).dtype == torch.float16


def test_nothing_is_said_where_all_is_served(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "blade.checkpoint"):
        assert len(SelectedWeights(Mixed(), {}).names()) == 4
    assert not caplog.text
