"""What is not served is not seen, and the log says so."""

from __future__ import annotations

import logging

import pytest
import torch

from blade.nn import SelectedWeights
from blade.testing import TensorWeights

WITH_EYES = TensorWeights(
    {name: torch.ones(2) for name in ("model.norm.weight", "mtp.norm.weight", "model.visual.a", "model.visual.b")}
)


def test_parts_are_left_out_by_name(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "blade.checkpoint"):
        selected = SelectedWeights(WITH_EYES, {"model.visual.": "vision", "mtp.": "multi-token prediction"})
    assert list(selected.names()) == ["model.norm.weight"]
    assert "no part of the model that is served: multi-token prediction (1 tensors), vision (2 tensors)" in caplog.text
    assert selected.get("model.norm.weight", torch.float16).dtype == torch.float16


def test_nothing_is_said_where_all_is_served(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "blade.checkpoint"):
        assert len(SelectedWeights(WITH_EYES, {}).names()) == 4
    assert not caplog.text
