"""Weight formats whose matrices are `blade.GroupedWeight`s, which op sets compute on as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from blade.contracts import Weights
from blade.errors import ConfigError
from blade.nn.tensors import check_shape, stacked_bias

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    import torch
    from torch import Tensor

    from blade.contracts import Linear, Ops
    from blade.types import GGMLBlocks, GroupedWeight


class GroupedQuantization:
    """contracts.Quantization: a subclass says which tensors it has, and makes their matrices, one at a time."""

    def grouped_bytes(self, name: str, weights: Weights) -> int | None:
        """Bytes of what `grouped` would give, its integers packed; None where the tensor stays plain."""
        raise NotImplementedError

    def grouped(self, name: str, weights: Weights) -> GroupedWeight:
        """The matrix of a tensor [N, K] on the CPU."""
        raise NotImplementedError

    def num_bytes(self, name: str, weights: Weights, ops: Ops, dtype: torch.dtype) -> int | None:
        check_kernels(ops, dtype)
        return self.grouped_bytes(name, weights)

    def linear(
        self, prefixes: Seq[str], shapes: Seq[tuple[int, int] | None], weights: Weights, ops: Ops, dtype: torch.dtype
    ) -> Linear | None:
        """Plain where one of the matrices is: a stack is either or."""
        check_kernels(ops, dtype)
        names = [f"{prefix}.weight" for prefix in prefixes]
        for name, shape in zip(names, shapes, strict=True):
            check_shape(name, weights, shape)
        if any(self.grouped_bytes(name, weights) is None for name in names):
            return None
        sizes = [weights.shape(name)[0] for name in names]
        return self.stack(names, weights, ops, stacked_bias(prefixes, sizes, weights, dtype))

    def stack(self, names: Seq[str], weights: Weights, ops: Ops, bias: Tensor | None) -> Linear:
        """The linear over the matrices of these tensors. A subclass may know a shorter way to it than `grouped`."""
        return ops.quantized_linear([self.grouped(name, weights) for name in names], bias)


def check_kernels(ops: Ops, dtype: torch.dtype) -> None:
    """Raise ConfigError where the op set cannot compute on grouped weights."""
    if dtype in ops.quantized_dtypes:
        return
    known = ", ".join(sorted(_name(known) for known in ops.quantized_dtypes))
    raise ConfigError(
        f"The device ({ops.name}) has no kernels for quantised weights{f' in {_name(dtype)}' if known else ''}.",
        f"Use --dtype {known}." if known else "Leave --quantize out, or choose another --device.",
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class StoredWeights(Weights, Protocol):
    """Weights of a file that holds grouped weights, as GGUF's blocks are."""

    def grouped_bytes(self, name: str) -> int | None:
        """Bytes of what `grouped` gives, its integers packed; None for plain numbers and for what is no matrix."""
        ...

    def grouped(self, name: str) -> GroupedWeight:
        """The matrix as it is stored, without loss."""
        ...

    def blocks(self, name: str) -> GGMLBlocks:
        """The same matrix in the file's own bytes."""
        ...


class Stored(GroupedQuantization):
    """The matrices as `weights`, the checkpoint's own, has them stored."""

    def __init__(self, weights: StoredWeights) -> None:
        self._stored = weights

    def grouped_bytes(self, name: str, weights: Weights) -> int | None:
        return self._stored.grouped_bytes(name)

    def grouped(self, name: str, weights: Weights) -> GroupedWeight:
        return self._stored.grouped(name)

    def stack(self, names: Seq[str], weights: Weights, ops: Ops, bias: Tensor | None) -> Linear:
        """Straight from the file's bytes, where the op set can."""
        linear = ops.blocks_linear([self._stored.blocks(name) for name in names], bias)
        return linear or super().stack(names, weights, ops, bias)
