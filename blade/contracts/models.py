"""Models and how they get their weights. See blade.contracts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping
    from collections.abc import Sequence as Seq

    import torch
    from torch import Tensor

    from blade.contracts.devices import Attention, Ops
    from blade.types import Batch, KVCache, ModelConfig


class Model(Protocol):
    """A loaded decoder."""

    config: ModelConfig

    def forward(self, batch: Batch, kv: KVCache) -> Tensor:
        """Store the KV of the batch's T tokens and return logits, [R, vocab_size] float32, of batch.logits_rows; the
        caller may overwrite them."""
        ...


class Architecture(Protocol):
    """One entry of config.json's `architectures`: what `register_models` registers a factory of.

    An architecture whose checkpoints hold more than it loads, or hold it in another shape, may have a method
    ``weights(config: Mapping[str, Any], weights: Weights) -> Weights``: the checkpoint as its model is to see it."""

    def configure(self, config: Mapping[str, Any]) -> ModelConfig:
        """Read config.json's content; raise CheckpointError naming the key that cannot be served."""
        ...

    def build(self, config: Any, loader: Loader) -> Model:
        """Load the weights through `loader` and return the model, ready to run. `config` is what `configure` returned,
        with max_context as it was asked for."""
        ...


class Weights(Protocol):
    """The named tensors of a checkpoint, under their Hugging Face names whatever the file format."""

    def names(self) -> Collection[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def get(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor on the CPU, dequantised where the file holds blocks; in its own dtype unless one is asked for."""
        ...

    def release(self, names: Iterable[str]) -> None:
        """The caller keeps nothing that it was given of these tensors: they need not stay in memory."""
        ...


class Linear(Protocol):
    """y = x W^T + b, however W is kept: [..., K] -> [..., N]."""

    def __call__(self, x: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        """In x's dtype, or in `out_dtype`: logits are wanted in float32, where sums are kept anyway."""
        ...


class Experts(Protocol):
    """A mixture of feed-forward networks (Shazeer et al. 2017), each down(silu(gate(x)) * up(x))."""

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor, weigh_input: bool = False) -> Tensor:
        """x [T, D], a token's experts `ids` [T, k] int64 (all different) and their `weights` [T, k] float32: the
        weighted sum of what they make of x, [T, D]; with `weigh_input` (Llama 4) the sum of what they make of x times
        their weight, both rounded to x's dtype. A row depends on nothing but itself."""
        ...


class Loader(Protocol):
    """How a model gets its parts: weights in the run's dtype on the run's device, linears and embeddings in the
    checkpoint's format, or in the one that was asked for."""

    ops: Ops
    attention: Attention
    dtype: torch.dtype

    def has(self, name: str) -> bool:
        """Whether there is such a tensor; of "lm_head.weight", in whatever form the checkpoint has that matrix."""
        ...

    def tensor(self, name: str, shape: tuple[int, ...] | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """In the run's dtype unless another is asked for. Raises CheckpointError when it is missing or has another
        shape than the model expects."""
        ...

    def linear(
        self,
        *prefixes: str,
        shapes: Seq[tuple[int, int]] | None = None,
        order: Tensor | None = None,
        known_as: tuple[str, Tensor] | None = None,
    ) -> Linear:
        """One linear over the tensors under `prefixes` (each with .weight and maybe .bias), stacked along N; `shapes`
        are the (N, K) expected under each. With `order` [sum of N] int64, row i of the linear is row order[i] of the
        stack; it leaves every row within its own tensor. `known_as`: the prefix under which other checkpoints have the
        whole stack, and adapters with them, and which of its rows there each row of the linear is, [sum of N] int64.
        Raises CheckpointError as `tensor` does."""
        ...

    def embedding(
        self, prefix: str, shape: tuple[int, int] | None = None, tied: Linear | None = None
    ) -> Callable[[Tensor], Tensor]:
        """ids [T] int64 -> [T, D] over the tensor `prefix`.weight, [V, D] = `shape`. Where the op set can, from the
        memory of `tied`, the linear over the same tensor; else in a quantised format if the tensor has one."""
        ...

    def experts(self, prefix: str, gate_up: Seq[Linear], down: Seq[Linear], shape: tuple[int, int]) -> Experts:
        """The op set's experts over the linears of those under `prefix`.0, `prefix`.1 ..., of `shape` (I, D), which
        adapters may change."""
        ...


class Quantization(Protocol):
    """A weight format, chosen by the checkpoint's `quantization_config.quant_method`, or made of plain weights as
    ``--quantize NAME`` asks; it swaps Linear."""

    def linear(
        self, prefixes: Seq[str], shapes: Seq[tuple[int, int] | None], weights: Weights, ops: Ops, dtype: torch.dtype
    ) -> Linear | None:
        """The linear over the quantised tensors under `prefixes`, stacked along N, with their biases; None where it is
        to be plain. `shapes` are the (N, K) that the model expects under each, where it says so: raise CheckpointError
        for others."""
        ...

    def num_bytes(self, name: str, weights: Weights, ops: Ops, dtype: torch.dtype) -> int | None:
        """Bytes of memory that the tensor takes once `linear` has loaded it; None where it is plain."""
        ...

    # A format that packs numbers may say how many: num_params(name, weights) -> int | None, as num_bytes does of bytes.
