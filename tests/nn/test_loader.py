"""What the loader takes from a checkpoint, what it refuses, what it says meanwhile."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from blade import CheckpointError
from blade.nn import Loader
from blade.nn.shape_check import ShapeCheck
from blade.testing import TensorWeights
from blade_native.reference import TorchOps

WEIGHTS = TensorWeights(
    {
        "a.weight": torch.arange(12.0).view(3, 4),
        "own.weight": torch.arange(12.0).view(3, 4),
        "b.weight": torch.arange(8.0).view(2, 4) - 4,
        "b.bias": torch.tensor([10.0, 20.0]),
        "c.weight": torch.ones(2, 5),
        "c.bias": torch.ones(3),
        "norm.weight": torch.ones(4, dtype=torch.float16),
    }
)
X = torch.tensor([[1.0, 2.0, 3.0, 4.0]])


def loader(kind: type[Loader] = Loader, **settings: Any) -> Loader:
    return kind(WEIGHTS, TorchOps(), None, torch.float32, **settings)  # type: ignore[arg-type]


def test_tensors_come_in_the_dtype_of_the_run() -> None:
    assert loader().tensor("norm.weight", (4,)).dtype == torch.float32
    assert loader().has("norm.weight")
    assert not loader().has("norm.bias")


def test_linears_are_stacked_and_missing_biases_are_zero() -> None:
    y = loader().linear("a", "b", shapes=[(3, 4), (2, 4)])(X)
    assert y.tolist() == [[20.0, 60.0, 100.0, 10.0 - 20, 20.0 + 20]]
    assert loader().linear("a")(X).tolist() == [[20.0, 60.0, 100.0]]


@pytest.mark.parametrize(
    ("load", "words"),
    [
        (lambda it: it.tensor("gone.weight"), "The checkpoint has no tensor gone.weight."),
        (lambda it: it.linear("a", "gone"), "The checkpoint has no tensor gone.weight."),
        (
            lambda it: it.tensor("norm.weight", (5,)),
            "Tensor norm.weight has shape (4,); by config.json it would be (5,).",
        ),
        (lambda it: it.linear("a", "b", shapes=[(2, 4), (3, 4)]), "Tensor a.weight has shape (3, 4)"),
        (lambda it: it.linear("c"), "Tensor c.bias has shape (3,)"),
    ],
)
@pytest.mark.parametrize("kind", [Loader, ShapeCheck])
def test_what_does_not_fit_is_named(load: Any, words: str, kind: type[Loader]) -> None:
    with pytest.raises(CheckpointError) as caught:
        load(loader(kind))
    assert words in str(caught.value)


def test_shapes_are_checked_by_headers_alone() -> None:
    class Headers(TensorWeights):
        def get(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
            raise AssertionError(name)

    it = ShapeCheck(Headers(WEIGHTS.tensors), TorchOps(), None, torch.float32)  # type: ignore[arg-type]
    linear = it.linear("a", "b", shapes=[(3, 4), (2, 4)])
    it.embedding("own", (3, 4))
    assert it.tensor("norm.weight", (4,)).add(1).shape == (4,)
    with pytest.raises(CheckpointError, match="own"):
        it.embedding("own", (3, 5))
    with pytest.raises(TypeError, match="nothing has been loaded"):
        linear(X)


def test_progress_counts_each_tensor_once_in_bytes() -> None:
    told: list[int] = []
    it = loader(progress=told.append)
    it.tensor("norm.weight")
    it.linear("a", "b")
    it.linear("a")
    assert told == [16, 48, 32, 8]


def test_an_embedding_shares_the_memory_of_the_linear_it_is_tied_to() -> None:
    it = loader()
    linear: Any = it.linear("own")
    ids = torch.tensor([2, 0])
    assert it.embedding("own", (3, 4), linear)(ids).tolist() == [[8.0, 9, 10, 11], [0, 1, 2, 3]]
    linear.weight.zero_()
    assert it.embedding("own", (3, 4), linear)(ids).tolist() == [[0.0] * 4] * 2
    assert it.embedding("a", (3, 4))(ids).tolist() == [[8.0, 9, 10, 11], [0, 1, 2, 3]]


class Doubling:
    """contracts.Quantization of the tensors under `a`: twice their values."""

    def linear(self, prefixes: Any, shapes: Any, weights: TensorWeights, ops: Any, dtype: torch.dtype) -> Any:
        return (lambda x: x @ weights.get("a.weight").T * 2) if prefixes == ("a",) else None

    def num_bytes(self, name: str, weights: TensorWeights, ops: Any, dtype: torch.dtype) -> int | None:
        return 5 if name == "a.weight" else None


def test_quantized_linears_replace_plain_ones() -> None:
    told: list[int] = []
    it = loader(quantization=Doubling(), progress=told.append)
    assert it.linear("a")(X).tolist() == [[40.0, 120.0, 200.0]]
    assert it.linear("b")(X).tolist() == [[-10.0, 40.0]]
    assert told == [5, 32, 8]
