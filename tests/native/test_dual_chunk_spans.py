"""Dual chunk attention in torch: what a long context does, in a short one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from blade import DualChunks, KVSpec
from blade.testing.attention import make_batch
from blade_native import dual_chunks
from blade_native.attention import PagedAttention
from blade_native.reference import TorchOps


@pytest.mark.parametrize("storage", [None, "int8"])
def test_spans_of_keys_and_runs_of_queries_are_put_together(
    monkeypatch: pytest.MonkeyPatch, storage: str | None
) -> None:
    torch.manual_seed(0)
    spec = KVSpec(1, 6, 2, 16, "float32", 16, storage)
    tables = [list(range(0, 40, 2)), [1, 3, 5, 7]]
    batch = make_batch(tables, [(0, 310), (0, 50)], 16, TorchOps())
    q, k, v, cos_sin = torch.randn(360, 6, 16), torch.randn(360, 2, 16), torch.randn(360, 2, 16), torch.randn(60, 16)

    def attended() -> Tensor:
        attention = PagedAttention(torch.device("cpu"))
        (layer_kv,) = attention.allocate(spec, 40)
        return attention.attend_dual_chunks(q, k, v, cos_sin, batch, layer_kv, 0.25, DualChunks(48, 59))

    whole = attended()
    monkeypatch.setattr(dual_chunks, "MAX_KEYS", 40)
    monkeypatch.setattr(dual_chunks, "MAX_ROWS", 200)
    torch.testing.assert_close(attended(), whole, rtol=0, atol=1e-5)
