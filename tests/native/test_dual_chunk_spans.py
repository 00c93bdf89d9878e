"""Dual chunk attention in torch: what a long context does, in a short one."""

from __future__ import annotations

import pytest
import torch

from blade.testing import check_attention
from blade_native import dual_chunks
from blade_native.attention import PagedAttention
from blade_native.reference import TorchOps


def test_spans_of_keys_and_runs_of_queries_are_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dual_chunks, "MAX_KEYS", 40)
    monkeypatch.setattr(dual_chunks, "MAX_ROWS", 24)
    check_attention(lambda ops: PagedAttention(ops.device), TorchOps(), [torch.float32])
