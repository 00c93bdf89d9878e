"""Adapters of linears whose rows a family has put into another order."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from blade.nn import Loader
from blade.nn.lora import Adapters
from blade.types import LowRank
from blade_native.reference import TorchOps


def test_an_update_follows_the_rows_of_its_linear() -> None:
    torch.manual_seed(0)
    q, k = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"
    tensors = {f"{q}.weight": torch.randn(8, 6), f"{k}.weight": torch.randn(4, 6)}
    weights = SimpleNamespace(
        names=lambda: tensors,
        get=lambda name, dtype=None: tensors[name],
        shape=lambda name: tuple(tensors[name].shape),
        release=lambda names: None,
    )
    ops = TorchOps()
    adapters = Adapters(ops, torch.float32)
    loader = Loader(weights, ops, SimpleNamespace(), torch.float32, adapters=adapters)
    order = torch.cat((torch.randperm(8), 8 + torch.randperm(4)))
    linear = loader.linear(q, k, shapes=[(8, 6), (4, 6)], order=order)
    update = LowRank(torch.randn(3, 6), torch.randn(4, 3), 0.5)
    adapter = adapters.make("x", {k: update})
    merged = torch.cat((tensors[f"{q}.weight"], tensors[f"{k}.weight"] + 0.5 * update.b @ update.a))
    x = torch.randn(5, 6)
    with adapters.chosen([adapter] * 5):
        torch.testing.assert_close(linear(x), x @ merged[order].T)
    with adapters.chosen([None, adapter, None, None, adapter]):
        mixed = linear(x)
    torch.testing.assert_close(mixed[[1, 4]], x[[1, 4]] @ merged[order].T)
    torch.testing.assert_close(mixed[[0, 2, 3]], linear(x)[[0, 2, 3]])
