"""Experts that share a tensor are seen one by one."""

from __future__ import annotations

import pytest
import torch

from blade.nn import SplitExperts
from blade.testing import TensorWeights

E, D, INNER = 3, 8, 5  # experts, width, inner width


class Fused(TensorWeights):
    """One layer."""

    def __init__(self, transposed: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        gate_up = torch.randn(E, 2 * INNER, D, generator=generator)
        down = torch.randn(E, D, INNER, generator=generator)
        self.gate_up, self.down = gate_up, down
        super().__init__(
            {
                "m.experts.gate_up_proj": gate_up.transpose(1, 2).contiguous() if transposed else gate_up,
                "m.experts.down_proj": down.transpose(1, 2).contiguous() if transposed else down,
                "m.gate.weight": torch.zeros(E, D),
                "n.experts.down_proj": torch.zeros(2, 2),  # of two axes: it is no stack of experts
            }
        )


@pytest.mark.parametrize("transposed", [False, True])
def test_each_expert_has_tensors_of_its_own(transposed: bool) -> None:
    fused = Fused(transposed)
    split = SplitExperts(fused, transposed)
    experts = {f"m.experts.{e}.{kind}_proj.weight" for e in range(E) for kind in ("gate", "up", "down")}
    assert set(split.names()) == experts | {"m.gate.weight", "n.experts.down_proj"}
    for e in range(E):
        for kind, expected in (
            ("gate", fused.gate_up[e, :INNER]),
            ("up", fused.gate_up[e, INNER:]),
            ("down", fused.down[e]),
        ):
            name = f"m.experts.{e}.{kind}_proj.weight"
            assert split.shape(name) == expected.shape
            assert torch.equal(split.get(name), expected)
            assert split.get(name).is_contiguous()
            assert torch.equal(split.get(name, torch.bfloat16), expected.bfloat16())
    assert torch.equal(split.get("m.gate.weight"), torch.zeros(E, D))


def test_a_fused_tensor_is_released_with_its_last_part() -> None:
    fused = Fused(transposed=False)
    split = SplitExperts(fused)
    split.release(["m.gate.weight"])
    names = [f"m.experts.{e}.down_proj.weight" for e in range(E)]
    split.release(names[:-1])
    assert fused.released == ["m.gate.weight"]
    split.release(names[-1:])
    assert fused.released == ["m.gate.weight", "m.experts.down_proj"]


@pytest.mark.parametrize("transposed", [False, True])
def test_adapters_may_have_been_trained_over_them_the_other_way(transposed: bool) -> None:
    assert SplitExperts(Fused(transposed), transposed).transposed is transposed
    assert SplitExperts(Fused(transposed), transposed, adapted=False).transposed is False
