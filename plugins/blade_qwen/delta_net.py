"""Gated delta nets (Yang, Kautz & Hatamizadeh 2024), the recurrent layers of Qwen3-Next and Qwen3.5."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from blade import StateSpec, StateTensor
from blade.nn import DecoderConfig, Keys

if TYPE_CHECKING:
    from torch import Tensor

    from blade import Batch
    from blade.contracts import Linear, Loader


@dataclass(slots=True, frozen=True)
class DeltaConfig:
    """The sizes of a gated delta net."""

    num_k_heads: int
    num_v_heads: int
    key_dim: int  # of a head
    value_dim: int
    window: int  # tokens that the short convolution sees

    @classmethod
    def read(cls, keys: Keys) -> DeltaConfig:
        num_k_heads, key_dim = keys.heads("linear_num_key_heads", "linear_key_head_dim")
        num_v_heads, value_dim = keys.heads("linear_num_value_heads", "linear_value_head_dim")
        if num_v_heads % num_k_heads:
            keys.refuse("linear_num_value_heads", f"a multiple of the {num_k_heads} key heads")
        return cls(
            num_k_heads=num_k_heads,
            num_v_heads=num_v_heads,
            key_dim=key_dim,
            value_dim=value_dim,
            window=keys.integer("linear_conv_kernel_dim", minimum=2),
        )

    @property
    def widths(self) -> tuple[int, int, int, int]:
        """Of queries, keys, values and gates, over all heads."""
        keys, values = self.num_k_heads * self.key_dim, self.num_v_heads * self.value_dim
        return keys, keys, values, values

    def state(self, layers: tuple[int, ...]) -> StateSpec:
        """The convolution's last inputs; the sums of key times value."""
        inputs = StateTensor((sum(self.widths[:3]), self.window - 1))
        sums = StateTensor((self.num_v_heads, self.key_dim, self.value_dim), "float32")
        return StateSpec(layers, (inputs, sums))


class DeltaNet:
    """blade.nn.TokenMixer: a linear, a short convolution, the gated delta rule, a gated norm, a linear."""

    def __init__(self, name: str, config: DecoderConfig, delta: DeltaConfig, loader: Loader) -> None:
        self.ops = loader.ops
        self.config, self.eps = delta, config.rms_norm_eps
        self.num_mixed = sum(delta.widths[:3])
        self.qkvz, self.ba = self.projections(name, config.hidden_size, loader)
        self.conv = loader.tensor(f"{name}.conv1d.weight", (self.num_mixed, 1, delta.window)).squeeze(1)
        heads = (delta.num_v_heads,)
        self.decay = -loader.tensor(f"{name}.A_log", heads, torch.float32).exp()
        self.dt_bias = loader.tensor(f"{name}.dt_bias", heads, torch.float32)
        self.norm = loader.tensor(f"{name}.norm.weight", (delta.value_dim,))
        self.out = loader.linear(f"{name}.out_proj", shapes=[(config.hidden_size, delta.widths[3])])

    def projections(self, name: str, hidden_size: int, loader: Loader) -> tuple[Linear, Linear]:
        """The linears to queries, keys, values and gates, and to each value head's b and a."""
        *mixed, gates = self.config.widths
        num_heads = self.config.num_v_heads
        qkvz = loader.linear(
            f"{name}.in_proj_qkv", f"{name}.in_proj_z", shapes=[(sum(mixed), hidden_size), (gates, hidden_size)]
        )
        ba = loader.linear(f"{name}.in_proj_b", f"{name}.in_proj_a", shapes=[(num_heads, hidden_size)] * 2)
        return qkvz, ba

    def __call__(self, x: Tensor, cos_sin: Tensor, batch: Batch, layer_kv: Any) -> Tensor:
        """x [T, hidden_size] -> [T, hidden_size]; layer_kv as DeltaConfig.state says."""
        config, num_tokens, (inputs, sums) = self.config, len(x), layer_kv
        qkvz = self.qkvz(x)
        mixed = self.ops.short_conv(qkvz[:, : self.num_mixed], self.conv, batch, inputs)
        q, k, v = torch.split_with_sizes(mixed, config.widths[:3], dim=1)
        b, a = torch.split_with_sizes(self.ba(x), [config.num_v_heads] * 2, dim=1)
        q, k = (part.view(num_tokens, config.num_k_heads, config.key_dim) for part in (q, k))
        v = v.view(num_tokens, config.num_v_heads, config.value_dim)
        y = self.ops.gated_delta(q, k, v, a, b, self.decay, self.dt_bias, batch, sums)
        gate = qkvz[:, self.num_mixed :].view(y.shape)
        return self.out(self.gated(y, gate).flatten(1))

    def gated(self, y: Tensor, gate: Tensor) -> Tensor:
        """What the rule gave, normalised and gated: [T, HV, DV] each."""
        return self.ops.gated_rms_norm(y, gate, self.norm, self.eps)


class GroupedDeltaNet(DeltaNet):
    """As Qwen3-Next stores it: the rows of each key head, and of the value heads that go with it, lie together."""

    def projections(self, name: str, hidden_size: int, loader: Loader) -> tuple[Linear, Linear]:
        num_heads, widths = self.config.num_k_heads, self.config.widths
        num_values = self.config.num_v_heads
        whole, rows = f"{name}.in_proj_qkvz", _ungrouped([width // num_heads for width in widths], num_heads)
        if loader.has(f"{name}.in_proj_qkv.weight"):  # llama.cpp's converter puts these rows in order
            shapes = [(sum(widths[:3]), hidden_size), (widths[3], hidden_size)]
            parts = f"{name}.in_proj_qkv", f"{name}.in_proj_z"
            qkvz = loader.linear(*parts, shapes=shapes, known_as=(whole, rows))
        else:
            qkvz = loader.linear(whole, shapes=[(sum(widths), hidden_size)], order=rows)
        ba = loader.linear(
            f"{name}.in_proj_ba",
            shapes=[(2 * num_values, hidden_size)],
            order=_ungrouped([num_values // num_heads] * 2, num_heads),
        )
        return qkvz, ba


def _ungrouped(widths: list[int], num_groups: int) -> Tensor:
    """The order of rows in which the parts of `widths` rows that each group has come one after the other for all
    groups."""
    rows = torch.arange(num_groups * sum(widths)).view(num_groups, -1)
    return torch.cat([part.flatten() for part in torch.split_with_sizes(rows, widths, dim=1)])
