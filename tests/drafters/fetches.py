"""Counts how often the host reads what lies on the device, on a CPU as well."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytest

READS = ("tolist", "item", "cpu", "numpy", "__array__", "__int__", "__float__", "__bool__", "__index__")


def count_fetches(monkeypatch: pytest.MonkeyPatch, call: Callable[[], Any]) -> int:
    """During the call."""
    num = 0

    def watched(read: Any) -> Any:
        def reading(*args: Any, **kwargs: Any) -> Any:
            nonlocal num
            num += 1
            return read(*args, **kwargs)

        return reading

    with monkeypatch.context() as patch:
        for name in READS:
            patch.setattr(torch.Tensor, name, watched(getattr(torch.Tensor, name)))
        call()
    return num
