"""Experts whose matrices are quantised one by one, as checkpoints of mixtures have them."""

from __future__ import annotations

import torch
from format_cases import QuantizedTorch, dense, make
from tensors import gptq, seeded

from blade.nn import Loader
from blade.testing import TensorWeights

SETTINGS = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False}
NUM_EXPERTS, INNER, OUTER = 3, 64, 96


def make_weights() -> TensorWeights:
    tensors = {}
    for expert in range(NUM_EXPERTS):
        for name, n, k in (("gate_proj", INNER, OUTER), ("up_proj", INNER, OUTER), ("down_proj", OUTER, INNER)):
            found, _ = gptq(4, 32, n, k)
            own = {key.replace("a.", f"x.experts.{expert}.{name}."): tensor.clone() for key, tensor in found.items()}
            own[f"x.experts.{expert}.{name}.qweight"] ^= 0x01234567 * (expert + 1) + len(name)
            tensors |= own
    return TensorWeights(tensors)


def test_a_mixture_of_quantised_experts() -> None:
    weights, ops, told = make_weights(), QuantizedTorch(), []
    loader = Loader(weights, ops, None, torch.float32, make(SETTINGS), told.append)  # type: ignore[arg-type]
    prefixes = [f"x.experts.{expert}" for expert in range(NUM_EXPERTS)]
    gate_up = [loader.linear(f"{p}.gate_proj", f"{p}.up_proj", shapes=[(INNER, OUTER)] * 2) for p in prefixes]
    down = [loader.linear(f"{p}.down_proj", shapes=[(OUTER, INNER)]) for p in prefixes]
    x = torch.randn(5, OUTER, generator=seeded())
    ids = torch.tensor([[0, 1], [2, 0], [1, 2], [0, 2], [1, 0]])
    shares = torch.rand(5, 2, generator=seeded(1))
    y = ops.experts(gate_up, down)(x, ids, shares)

    def expert(p: str, row: torch.Tensor) -> torch.Tensor:
        gate, up, down = (dense(SETTINGS, weights, f"{p}.{name}_proj") for name in ("gate", "up", "down"))
        return (torch.nn.functional.silu(row @ gate.T) * (row @ up.T)) @ down.T

    for row, chosen, share, found in zip(x, ids.tolist(), shares, y, strict=True):
        expected = sum(w * expert(prefixes[i], row) for i, w in zip(chosen, share, strict=True))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    assert sum(told) == NUM_EXPERTS * 3 * INNER * OUTER * (4 + 24 / 32) / 8
