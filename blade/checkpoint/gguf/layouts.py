"""What llama.cpp's converter changes of an architecture's tensors, and how blade has them back.

After https://github.com/ggml-org/llama.cpp/tree/master/conversion. Rows are whole blocks, and are put back in their
order; columns stay where they are, for blocks run along them: the matrix says which features they multiply.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from blade.checked import MAX_LAYERS
from blade.checkpoint.gguf.names import TensorNames
from blade.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from blade.checkpoint.gguf.metadata import Metadata

HYBRIDS = ("qwen35", "qwen35moe", "qwen3next")
_GATE = ".shared_expert_gate.weight"  # a matrix of one row, which llama.cpp stores as a vector
_CONV = ".conv1d.weight"


def layout_of(metadata: Metadata) -> Layout:
    if metadata.arch in HYBRIDS:
        return HybridLayout.read(metadata)
    if metadata.arch == "llama":
        num_heads = metadata.integer("attention.head_count")
        return LlamaLayout(num_heads, metadata.integer("attention.head_count_kv", num_heads))
    if metadata.arch == "llama4":
        return Layout(TensorNames(feed_forward="feed_forward", renamed={"ffn_gate_inp": "router"}))
    return Layout()


def num_layers(metadata: Metadata) -> int:
    """Of the model, without the heads that predict further tokens, which GGUF counts as layers."""
    whole = metadata.integer("block_count", maximum=MAX_LAYERS)
    heads = metadata.integer("nextn_predict_layers", 0, minimum=0) if metadata.arch in HYBRIDS else 0
    if heads >= whole:
        metadata.refuse("nextn_predict_layers", f"less than the {whole} layers there are")
    return whole - heads


class Layout:
    """Tensors by Hugging Face's names, as the file has them."""

    def __init__(self, names: TensorNames | None = None) -> None:
        self.names = names or TensorNames()

    def shape(self, name: str, stored: tuple[int, ...]) -> tuple[int, ...]:
        """To Hugging Face."""
        if name.endswith(_GATE) and len(stored) == 1:
            return (1, *stored)
        return (stored[0], 1, *stored[1:]) if name.endswith(_CONV) and len(stored) == 2 else stored

    def rows(self, name: str, num_rows: int) -> Tensor | None:
        """Which of the file's rows (of a vector: numbers) comes first, second, ...; None: they lie so. Raises
        ValueError where they cannot be ordered."""
        return None

    def columns(self, name: str, num_columns: int) -> Tensor | None:
        """Which feature each of the file's columns multiplies; None: they lie so. Raises ValueError likewise."""
        return None

    def is_changed(self, name: str) -> bool:
        """Whether `restored` is to be asked for its numbers."""
        return False

    def restored(self, name: str, numbers: Tensor) -> Tensor:
        """The numbers of a changed tensor, float32, before they were."""
        return numbers


class LlamaLayout(Layout):
    """llama.cpp rotates neighbouring channels of a head where Hugging Face rotates halves, and reorders the rows of
    queries and keys for it."""

    def __init__(self, num_heads: int, num_kv_heads: int) -> None:
        super().__init__()
        self._heads = {"q_proj": num_heads, "k_proj": num_kv_heads}

    def rows(self, name: str, num_rows: int) -> Tensor | None:
        num_heads = self._heads.get(name.split(".")[-2])
        if num_heads is None:
            return None
        return _swapped(num_rows, (num_heads, -1, 2), 1, f"{num_heads} heads")


@dataclass(slots=True, frozen=True)
class DeltaHeads:
    """Of recurrent layers."""

    num_k: int
    num_v: int
    key_dim: int
    value_dim: int

    @classmethod
    def read(cls, metadata: Metadata) -> DeltaHeads:
        num_k, num_v = metadata.integer("ssm.group_count"), metadata.integer("ssm.time_step_rank")
        inner = metadata.integer("ssm.inner_size")
        if num_v % num_k:
            metadata.refuse("ssm.time_step_rank", f"a multiple of the {num_k} key heads of ssm.group_count")
        if inner % num_v:
            metadata.refuse("ssm.inner_size", f"a multiple of the {num_v} value heads of ssm.time_step_rank")
        return cls(num_k, num_v, metadata.integer("ssm.state_size"), inner // num_v)


class HybridLayout(Layout):
    """Norms are stored with 1 added, A_log as -exp(A_log). Qwen3.5's value heads lie so that every key head has its
    first, then every one its second, where Hugging Face has those of one key head together."""

    def __init__(self, names: TensorNames, heads: DeltaHeads, tiled: bool) -> None:
        super().__init__(names)
        self._heads = heads
        self._tiled = tiled and heads.num_k != heads.num_v

    @classmethod
    def read(cls, metadata: Metadata) -> HybridLayout:
        names = TensorNames(recurrent=True, num_layers=num_layers(metadata))
        return cls(names, DeltaHeads.read(metadata), tiled=metadata.arch != "qwen3next")

    def rows(self, name: str, num_rows: int) -> Tensor | None:
        if not self._tiled or ".linear_attn." not in name:
            return None
        if name.endswith((".in_proj_qkv.weight", _CONV)):
            return self._values(num_rows, 2 * self._heads.num_k * self._heads.key_dim)
        tiled = (".in_proj_z.weight", ".in_proj_a.weight", ".in_proj_b.weight", ".A_log", ".dt_bias")
        return self._values(num_rows, 0) if name.endswith(tiled) else None

    def columns(self, name: str, num_columns: int) -> Tensor | None:
        """The inverse of the order of rows."""
        if not self._tiled or not name.endswith(".linear_attn.out_proj.weight"):
            return None
        return self._values(num_columns, 0).argsort()

    def _values(self, num_rows: int, start: int) -> Tensor:
        """Rows before `start` stay; the others are those of value heads."""
        import torch

        num_k, num_v = self._heads.num_k, self._heads.num_v
        rows = _swapped(num_rows - start, (num_v // num_k, num_k, -1), 0, f"{num_v} value heads")
        return torch.cat([torch.arange(start), rows + start])

    def is_changed(self, name: str) -> bool:
        norm = name.endswith("norm.weight") or ".pre_fc_norm_" in name
        return (norm and not name.endswith(".linear_attn.norm.weight")) or name.endswith(".A_log")

    def restored(self, name: str, numbers: Tensor) -> Tensor:
        if not name.endswith(".A_log"):
            return numbers - 1
        if not bool((numbers < 0).all()):
            raise CheckpointError(f"Tensor {name} of the GGUF file (ssm_a) must hold numbers below 0.")
        return (-numbers.double()).log().float()


def _swapped(num_rows: int, shape: tuple[int, int, int], dim: int, what: str) -> Tensor:
    """The numbers of so many rows where the dimension `dim` of `shape`, one of which is -1, changes places with the
    next. Raises ValueError."""
    import torch

    if num_rows < 1 or num_rows % abs(prod(shape)):
        raise ValueError(f"does not divide into {what}")
    return torch.arange(num_rows).view(shape).transpose(dim, dim + 1).flatten()
