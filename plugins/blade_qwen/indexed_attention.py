"""Attention that chooses which keys a query sees (Qwen4-Exp): small queries and keys beside the others say which groups
of tokens fit best, as many as a budget allows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch

from blade import KeySelection
from blade.nn import DecoderConfig, Keys, Norm, SelfAttention

if TYPE_CHECKING:
    from torch import Tensor

    from blade import Batch
    from blade.contracts import Loader, SlotAttention


def read_selection(keys: Keys, config: DecoderConfig) -> KeySelection | None:
    """What config.json says of the choice; None where the whole context is within the budget, and nothing is chosen.
    Raises CheckpointError naming the key that is missing or wrong."""
    found = KeySelection(
        num_heads=keys.integer("indexer_n_heads"),
        head_dim=keys.integer("indexer_head_dim"),
        group=keys.integer("indexer_compress_ratio"),
        budget=keys.integer("indexer_budget"),
    )
    if keys.integer("indexer_kv_heads") != 1:
        keys.refuse("indexer_kv_heads", "1")
    if found.budget % found.group:
        keys.refuse("indexer_budget", f"a multiple of indexer_compress_ratio, {found.group}")
    if found.head_dim < config.rope.rotary_dim:
        keys.refuse("indexer_head_dim", f"{config.rope.rotary_dim} or more, the channels of a head that are rotated")
    return found if found.most_keys < config.max_context else None


class Indexer:
    """Says at which slots the keys are that each token is to see."""

    def __init__(self, name: str, config: DecoderConfig, selection: KeySelection, loader: Loader) -> None:
        self.ops, self.selection, self.eps = loader.ops, selection, config.rms_norm_eps
        dim, self.widths = selection.head_dim, [selection.num_heads * selection.head_dim, selection.head_dim]
        self.qk = loader.linear(f"{name}.index_qk_proj", shapes=[(sum(self.widths), config.hidden_size)])
        self.q_norm, self.k_norm = (
            Norm(f"{name}.{part}_layernorm", dim, self.eps, loader, config.norm_offset) for part in "qk"
        )

    def __call__(self, x: Tensor, cos_sin: Tensor, batch: Batch, kept: Tensor) -> Tensor | None:
        """x [T, hidden_size] -> [T, most_keys] int32 as contracts.Ops.select_keys has it; None: all see all keys."""
        q, k = torch.split_with_sizes(self.qk(x), self.widths, dim=1)
        self.ops.keep_index_keys(k, self.k_norm.weight, self.eps, cos_sin, batch, kept, self.selection.group)
        if max(batch.kv_lens) <= self.selection.most_keys:
            return None
        q = self.q_norm(q.view(len(q), self.selection.num_heads, -1))
        return self.ops.select_keys(q, cos_sin, batch, kept, self.selection)


class IndexedAttention(SelfAttention):
    """SelfAttention over the keys that an indexer chooses. layer_kv is what attention allocated, and what the indexer
    keeps."""

    def __init__(self, name: str, config: DecoderConfig, selection: KeySelection, loader: Loader) -> None:
        super().__init__(name, config, None, loader)
        self.indexer = Indexer(f"{name}.indexer", config, selection, loader)

    def __call__(self, x: Tensor, cos_sin: Tensor, batch: Batch, layer_kv: Any) -> Tensor:
        kv, kept = layer_kv
        return super().__call__(x, cos_sin, batch, (kv, self.indexer(x, cos_sin, batch, kept)))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, cos_sin: Tensor, batch: Batch, layer_kv: Any) -> Tensor:
        """layer_kv: what attention allocated, and the slots of the keys to see, or None for all."""
        kv, slots = layer_kv
        if slots is None:
            return super().attend(q, k, v, cos_sin, batch, kv)
        q, _ = self.attention.rope_and_store(q, k, v, cos_sin, batch, kv)
        return cast("SlotAttention", self.attention).attend_slots(q, batch, kv, self.scale, slots)
