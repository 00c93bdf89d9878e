"""Formats of grouped weights: stacks, biases and shapes are taken care of."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from blade import CheckpointError, ConfigError, GroupedWeight
from blade.contracts import Weights
from blade.nn import GroupedQuantization, Loader, Matrix, dequantize
from blade.nn.grouped import Dequantized
from blade.nn.tensors import num_params
from blade.testing import TensorWeights
from blade_native.reference import TorchOps


class Ops(TorchOps):
    quantized_dtypes = (torch.float32,)


class Halves(GroupedQuantization):
    """Whole numbers, kept exactly; vectors and what is called plain stay plain."""

    def matrix(self, prefix: str, weights: Weights) -> Matrix | None:
        shape = weights.shape(f"{prefix}.weight")
        return Matrix(shape, 7) if len(shape) == 2 and "plain" not in prefix else None

    def weight(self, prefix: str, weights: Weights) -> GroupedWeight:
        weight = weights.get(f"{prefix}.weight")
        return GroupedWeight(8, 16, (weight + 128).byte(), torch.ones(len(weight), weight.shape[1] // 16).half())


A, B, X = (torch.randint(-9, 9, (n, 32), generator=torch.Generator().manual_seed(n)).float() for n in (3, 5, 2))
BIAS = torch.arange(5.0)
WEIGHTS = TensorWeights({"a.weight": A, "b.weight": B, "b.bias": BIAS, "plain.weight": A})


def loader(dtype: torch.dtype = torch.float32) -> Loader:
    return Loader(WEIGHTS, Ops(), None, dtype, Halves())  # type: ignore[arg-type]


def test_a_stack_has_the_biases_of_its_parts() -> None:
    y = loader().linear("a", "b", shapes=[(3, 32), (5, 32)])(X)
    assert y.equal(torch.cat([X @ A.T, X @ B.T + BIAS], dim=1))
    assert loader().linear("a")(X).equal(X @ A.T)


def test_each_part_of_a_stack_keeps_its_form() -> None:
    told: list[int] = []
    it = Loader(WEIGHTS, Ops(), None, torch.float32, Halves(), told.append)  # type: ignore[arg-type]
    linear: Any = it.linear("b", "a", "plain")
    assert [type(part).__name__ for part in linear.linears] == ["TorchQuantizedLinear", "TorchLinear"]
    assert linear(X).equal(torch.cat([X @ B.T + BIAS, X @ A.T, X @ A.T], dim=1))
    assert sorted(told) == [7, 7, 20, 4 * A.numel()]


class Packed(Halves):
    """The same, two numbers to a byte of a tensor with a name of its own."""

    tensors = ("packed",)

    def matrix(self, prefix: str, weights: Weights) -> Matrix | None:
        n, k = weights.shape(f"{prefix}.packed")
        return Matrix((n, 2 * k), 11)

    def weight(self, prefix: str, weights: Weights) -> GroupedWeight:
        packed = weights.get(f"{prefix}.packed")
        q = torch.stack([packed & 15, packed >> 4], dim=2).flatten(1)
        return GroupedWeight(4, 16, q, weights.get(f"{prefix}.scale"))


PACKED = TensorWeights(
    {
        "a.packed": torch.randint(256, (3, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8),
        "a.scale": torch.tensor([[0.5, 2], [1, 1], [3, 0.25]]).half(),
        "a.bias": torch.tensor([1.0, 2, 3]),
        "b.weight": B,
    }
)


def test_matrices_need_not_be_called_weight() -> None:
    told: list[int] = []
    it = Loader(PACKED, Ops(), None, torch.float32, Packed(), told.append)  # type: ignore[arg-type]
    dense = dequantize(Packed().weight("a", PACKED), torch.float32)
    assert it.linear("a", shapes=[(3, 32)])(X).equal(X @ dense.T + PACKED.get("a.bias"))
    assert sorted(told) == [0, 11, 12]
    assert it.has("a.weight")
    assert not it.has("a.scales")
    assert not it.has("c.weight")
    assert num_params(PACKED, Packed()) == 3 * 32 + 3 + B.numel()
    with pytest.raises(CheckpointError, match=r"Tensor a\.packed has shape \(3, 32\)"):
        it.linear("a", shapes=[(3, 16)])


def test_a_quantised_checkpoint_is_served_dense_when_asked() -> None:
    told: list[int] = []
    plain = Loader(PACKED, TorchOps(), None, torch.float32, Dequantized(Packed()), told.append)  # type: ignore[arg-type]
    quantized = Loader(PACKED, Ops(), None, torch.float32, Packed())  # type: ignore[arg-type]
    linear = plain.linear("a", "b")
    assert type(linear).__name__ == "TorchLinear"
    torch.testing.assert_close(linear(X), quantized.linear("a", "b")(X))
    assert sorted(told) == [0, 12, 4 * 3 * 32, 4 * B.numel()]


def test_an_embedding_is_read_from_the_same_format() -> None:
    ids = torch.tensor([4, 0, 4])
    told: list[int] = []
    it = Loader(WEIGHTS, Ops(), None, torch.float32, Halves(), told.append)  # type: ignore[arg-type]
    assert it.embedding("b", (5, 32))(ids).equal(B[ids])
    assert sorted(told) == [7, 20]  # and the bias beside it
    assert it.embedding("plain")(ids[1:2]).equal(A[:1])


class Odd(Halves):
    """The same, with a scale for four numbers in every layer but the last."""

    def matrix(self, prefix: str, weights: Weights) -> Matrix | None:
        found = super().matrix(prefix, weights)
        return found if found is None or prefix == "b" else Matrix(found.shape, found.num_bytes, plain=True)

    def weight(self, prefix: str, weights: Weights) -> GroupedWeight:
        weight = super().weight(prefix, weights)
        return weight if prefix == "b" else GroupedWeight(8, 4, weight.q, torch.ones(len(weight.q), 8).half())


def test_groups_that_no_kernel_computes_on_become_plain_numbers(caplog: pytest.LogCaptureFixture) -> None:
    told: list[int] = []
    names = ("layers.0.a", "layers.1.a", "b")
    weights = TensorWeights({"layers.0.a.weight": A, "layers.1.a.weight": A + 1, "b.weight": B})
    it = Loader(weights, Ops(), None, torch.float32, Odd(), told.append)  # type: ignore[arg-type]
    linear: Any = it.linear(*names, shapes=[(3, 32), (3, 32), (5, 32)])
    assert [type(part).__name__ for part in linear.linears] == ["TorchLinear", "TorchQuantizedLinear"]
    assert linear(X).equal(torch.cat([X @ A.T, X @ (A + 1).T, X @ B.T], dim=1))
    assert sorted(told) == [7, 4 * A.numel(), 4 * A.numel()]
    assert it.embedding("layers.1.a", (3, 32))(torch.tensor([2, 0])).equal(A[[2, 0]] + 1)
    (record,) = caplog.records
    assert record.getMessage().startswith("layers.*.a becomes plain numbers: no kernel computes on")
    with pytest.raises(CheckpointError, match=r"Tensor layers\.0\.a\.weight has shape \(3, 32\)"):
        it.linear("layers.0.a", shapes=[(3, 16)])


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"Tensor a\.weight has shape \(3, 32\); by config\.json .* \(4, 32\)"):
        loader().linear("a", shapes=[(4, 32)])
    with pytest.raises(CheckpointError, match=r"no tensor gone\.weight"):
        loader().linear("gone")
    with pytest.raises(
        ConfigError, match=r"torch\) has no kernels for quantised weights in bfloat16\. Use --dtype float32"
    ):
        loader(torch.bfloat16).linear("a")
