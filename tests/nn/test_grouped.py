"""Formats of grouped weights: stacks, biases and shapes are taken care of."""

from __future__ import annotations

import pytest
import torch
from test_loader import DictWeights

from blade import CheckpointError, ConfigError, GroupedWeight
from blade.contracts import Weights
from blade.nn import GroupedQuantization, Loader
from blade_native.reference import TorchOps


class Ops(TorchOps):
    quantized_dtypes = (torch.float32,)


class Halves(GroupedQuantization):
    """Whole numbers, kept exactly; vectors and what is called plain stay plain."""

    def grouped_bytes(self, name: str, weights: Weights) -> int | None:
        return 7 if len(weights.shape(name)) == 2 and "plain" not in name else None

    def grouped(self, name: str, weights: Weights) -> GroupedWeight:
        weight = weights.get(name)
        return GroupedWeight(8, 16, (weight + 128).byte(), torch.ones(len(weight), weight.shape[1] // 16).half())


A, B, X = (torch.randint(-9, 9, (n, 32), generator=torch.Generator().manual_seed(n)).float() for n in (3, 5, 2))
BIAS = torch.arange(5.0)
WEIGHTS = DictWeights({"a.weight": A, "b.weight": B, "b.bias": BIAS, "plain.weight": A})


def loader(dtype: torch.dtype = torch.float32) -> Loader:
    return Loader(WEIGHTS, Ops(), None, dtype, Halves())  # type: ignore[arg-type]


def test_a_stack_has_the_biases_of_its_parts() -> None:
    y = loader().linear("a", "b", shapes=[(3, 32), (5, 32)])(X)
    assert y.equal(torch.cat([X @ A.T, X @ B.T + BIAS], dim=1))
    assert loader().linear("a")(X).equal(X @ A.T)


def test_a_stack_with_a_plain_part_is_plain() -> None:
    linear = loader().linear("b", "plain")
    assert type(linear).__name__ == "TorchLinear"
    assert linear(X).equal(torch.cat([X @ B.T + BIAS, X @ A.T], dim=1))


def test_an_embedding_is_read_from_the_same_format() -> None:
    ids = torch.tensor([4, 0, 4])
    told: list[int] = []
    it = Loader(WEIGHTS, Ops(), None, torch.float32, Halves(), told.append)  # type: ignore[arg-type]
    assert it.embedding("b", (5, 32))(ids).equal(B[ids])
    assert sorted(told) == [7, 20]  # and the bias beside it
    assert it.embedding("plain")(ids[1:2]).equal(A[:1])


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"Tensor a\.weight has shape \(3, 32\); by config\.json .* \(4, 32\)"):
        loader().linear("a", shapes=[(4, 32)])
    with pytest.raises(CheckpointError, match=r"no tensor gone\.weight"):
        loader().linear("gone")
    with pytest.raises(
        ConfigError, match=r"torch\) has no kernels for quantised weights in bfloat16\. Use --dtype float32"
    ):
        loader(torch.bfloat16).linear("a")
