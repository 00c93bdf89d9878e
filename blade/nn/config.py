"""config.json of the Llama-like families, read and validated."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from blade.nn.dual_chunks import read_dual_chunks
from blade.nn.keys import Keys
from blade.nn.mixture import MixtureConfig
from blade.nn.rope import Rope
from blade.nn.rope_config import read_rope
from blade.types import ModelConfig

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from blade.types import DualChunks


@dataclass(slots=True, frozen=True)
class DecoderConfig(ModelConfig):
    """What `Decoder` is built from."""

    hidden_size: int
    intermediate_size: int
    rms_norm_eps: float
    tied: bool  # the embedding is the output matrix too, where the checkpoint has none of its own
    rope: Rope
    windows: tuple[int | None, ...]  # per layer: how many last tokens it attends to; None is all
    qk_norm: bool  # heads of queries and keys are normalised before they are rotated

    prefix: str = field(default="model", kw_only=True)  # of the names of the layers' tensors
    head: str = field(default="lm_head", kw_only=True)  # of the name of the output matrix
    norm_offset: float = field(default=0.0, kw_only=True)  # added to the weights of norms
    output_gate: bool = field(default=False, kw_only=True)  # attention has one; its rows lie beside each head's query
    mixture: MixtureConfig | None = field(default=None, kw_only=True)  # of the layers that have one
    sharpened_after: int | None = field(default=None, kw_only=True)  # tokens: see blade.nn.dual_chunks
    skipped_layers: frozenset[int] = field(default=frozenset(), kw_only=True)  # that the checkpoint counts
    extra_rows: int = field(default=0, kw_only=True)  # of the embedding, beyond the vocabulary

    @property
    def chunks(self) -> DualChunks | None:
        """`dual_chunks`, where a context may go beyond what is attention as usual."""
        chunks = self.dual_chunks
        return chunks if chunks is not None and self.max_context > chunks.num_undivided else None

    def rope_table(self) -> Tensor:
        """Rope.table of the positions that there are."""
        return self.rope.table(self.max_context if self.chunks is None else self.chunks.num_undivided)

    @classmethod
    def read(cls, config: Mapping[str, Any] | Keys, qk_norm: bool = False, **settings: Any) -> Self:
        """From config.json's content; `settings` are further fields, and those that it says nothing of. Raises
        CheckpointError naming the key that is missing, wrong or not served."""
        keys = config if isinstance(config, Keys) else Keys(config)
        if keys.text("hidden_act", "silu") != "silu":
            keys.refuse("hidden_act", "silu")
        hidden_size = keys.integer("hidden_size")
        num_heads, head_dim = keys.heads("num_attention_heads", "head_dim", hidden_size)
        num_kv_heads = keys.integer("num_key_value_heads", num_heads)
        if num_heads % num_kv_heads:
            keys.refuse("num_key_value_heads", f"a divisor of the {num_heads} attention heads")
        num_layers = keys.num_layers()
        rope = read_rope(keys, head_dim)
        dual_chunks, sharpened_after = read_dual_chunks(keys)
        found: dict[str, Any] = {
            "vocab_size": keys.integer("vocab_size"),
            "max_context": rope.max_context,
            "num_layers": num_layers,
            "num_heads": num_heads,
            "num_kv_heads": num_kv_heads,
            "head_dim": head_dim,
            "hidden_size": hidden_size,
            "rms_norm_eps": keys.number("rms_norm_eps", 1e-6),
            "tied": keys.flag("tie_word_embeddings", False),
            "rope": rope,
            "qk_norm": qk_norm,
            "dual_chunks": dual_chunks,
            "sharpened_after": sharpened_after,
        }
        if "architecture" not in settings:
            found["architecture"] = keys.texts("architectures")[0]
        if "intermediate_size" not in settings:
            found["intermediate_size"] = keys.integer("intermediate_size")
        if "windows" not in settings:
            found["windows"] = _windows(keys, num_layers)
        return cls(**found | settings)


def _windows(keys: Keys, num_layers: int) -> tuple[int | None, ...]:
    """`layer_types` where it is there; else, as before transformers 5, layers from `max_window_layers` on slide."""
    if not keys.flag("use_sliding_window", False):
        return (None,) * num_layers
    window = keys.integer("sliding_window")
    if keys.has("layer_types"):
        kinds = keys.texts("layer_types")
        if len(kinds) != num_layers or not {"full_attention", "sliding_attention"}.issuperset(kinds):
            keys.refuse("layer_types", f"full_attention or sliding_attention, once for each of {num_layers} layers")
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)
    first = keys.integer("max_window_layers", 28, minimum=0)
    return tuple(window if layer >= first else None for layer in range(num_layers))
