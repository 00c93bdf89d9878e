"""The first Qwen, `QWenLMHeadModel`: today's decoder under other names (Bai et al. 2023).

Within the context that it was trained on, which is what blade serves, neither its dynamic NTK rope nor its log-n
attention changes anything. None of the checkpoint's own code is run.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING, Any

from blade.nn import ChannelMixer, Decoder, DecoderConfig, FeedForward, Keys, Layer, Rope, SelfAttention, TokenMixer

if TYPE_CHECKING:
    from blade.contracts import Linear, Loader


class Qwen1:
    """contracts.Architecture of `QWenLMHeadModel`."""

    def configure(self, config: Mapping[str, Any]) -> DecoderConfig:
        keys = Keys(config)
        num_heads, hidden_size = keys.integer("num_attention_heads"), keys.integer("hidden_size")
        num_layers, head_dim = keys.num_layers(), keys.integer("kv_channels", hidden_size // num_heads)
        rotary_dim = int(head_dim * keys.number("rotary_pct", 1.0))
        if rotary_dim % 2 or not 2 < rotary_dim <= head_dim:
            keys.refuse("rotary_pct", f"a share of the head's {head_dim} channels that makes pairs of them")
        trained = keys.integer("seq_length", keys.integer("max_position_embeddings", 2048))
        return DecoderConfig(
            architecture=keys.texts("architectures")[0],
            vocab_size=keys.integer("vocab_size"),
            max_context=trained,
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_heads,
            head_dim=head_dim,
            hidden_size=hidden_size,
            intermediate_size=keys.integer("intermediate_size") // 2,  # it counts gate and up together
            rms_norm_eps=keys.number("layer_norm_epsilon", 1e-6),
            tied=keys.flag("tie_word_embeddings", False),
            rope=Rope(keys.number("rotary_emb_base", 10000.0), rotary_dim, trained),
            windows=(None,) * num_layers,
            qk_norm=False,
            prefix="transformer",
        )

    def build(self, config: DecoderConfig, loader: Loader) -> Decoder:
        return Qwen1Decoder(config, loader)


class Qwen1Layer(Layer):
    norm_names = ("ln_1", "ln_2")


class Qwen1Decoder(Decoder):
    """contracts.Model."""

    names = ("wte", "h", "ln_f")
    layer_type = Qwen1Layer

    def token_mixer(self, name: str, index: int, loader: Loader) -> TokenMixer:
        return FusedAttention(f"{name}.attn", self.config, None, loader)

    def channel_mixer(self, name: str, index: int, loader: Loader) -> ChannelMixer:
        return RenamedFeedForward(f"{name}.mlp", self.config.intermediate_size, self.config.hidden_size, loader)


class FusedAttention(SelfAttention):
    """Queries, keys and values are one matrix."""

    def projections(
        self, name: str, qkv: Seq[tuple[int, int]], o: tuple[int, int], loader: Loader
    ) -> tuple[Linear, Linear]:
        whole = sum(n for n, _ in qkv), qkv[0][1]
        return loader.linear(f"{name}.c_attn", shapes=[whole]), loader.linear(f"{name}.c_proj", shapes=[o])


class RenamedFeedForward(FeedForward):
    """The gate is w2, up is w1."""

    def __init__(self, name: str, inner: int, outer: int, loader: Loader) -> None:
        self.ops = loader.ops
        self.gate_up = loader.linear(f"{name}.w2", f"{name}.w1", shapes=[(inner, outer)] * 2)
        self.down = loader.linear(f"{name}.c_proj", shapes=[(outer, inner)])
