"""Mixtures of experts in place of a layer's feed-forward network (Shazeer et al. 2017; Switch, Fedus et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from blade.contracts import Experts, Loader
    from blade.nn.keys import Keys


@dataclass(slots=True, frozen=True)
class MixtureConfig:
    """Which layers have a mixture, and of what."""

    layers: frozenset[int]
    num_experts: int
    num_active: int  # experts that a token goes to
    intermediate_size: int  # of an expert
    shared_intermediate_size: int  # of the expert that all tokens go to; 0: there is none
    normalize: bool  # the weights of a token's experts sum to 1

    @classmethod
    def read(cls, keys: Keys, normalize: bool = False, shared: bool = False) -> MixtureConfig:
        """As Qwen's families write it; `normalize` where norm_topk_prob is missing, `shared`: there is a shared
        expert."""
        num_layers, step = keys.num_layers(), keys.integer("decoder_sparse_step", 1)
        dense = keys.integers("mlp_only_layers", [])
        key = "num_experts" if keys.has("num_experts") else "num_local_experts"  # as transformers 5 writes Qwen3's
        num_experts, num_active = keys.num_experts(key), keys.integer("num_experts_per_tok")
        if num_active > num_experts:
            keys.refuse("num_experts_per_tok", f"at most the {num_experts} experts there are")
        return cls(
            layers=frozenset(i for i in range(num_layers) if (i + 1) % step == 0 and i not in dense),
            num_experts=num_experts,
            num_active=num_active,
            intermediate_size=keys.integer("moe_intermediate_size"),
            shared_intermediate_size=keys.integer("shared_expert_intermediate_size") if shared else 0,
            normalize=keys.flag("norm_topk_prob", normalize),
        )


def load_experts(name: str, num_experts: int, inner: int, outer: int, loader: Loader) -> Experts:
    """The experts under `name`, feed-forward networks outer -> inner -> outer, each in the checkpoint's format."""
    prefixes = [f"{name}.{expert}" for expert in range(num_experts)]
    gate_up = [
        loader.linear(f"{prefix}.gate_proj", f"{prefix}.up_proj", shapes=[(inner, outer)] * 2) for prefix in prefixes
    ]
    down = [loader.linear(f"{prefix}.down_proj", shapes=[(outer, inner)]) for prefix in prefixes]
    return loader.experts(name, gate_up, down, (inner, outer))


class SharedExpert:
    """The expert that all tokens go to, weighed by a gate of its own where it has one."""

    def __init__(self, name: str, config: MixtureConfig, hidden_size: int, loader: Loader, gated: bool = True) -> None:
        self.ops = loader.ops
        inner = config.shared_intermediate_size
        self.gate_up = loader.linear(f"{name}.gate_proj", f"{name}.up_proj", shapes=[(inner, hidden_size)] * 2)
        self.down = loader.linear(f"{name}.down_proj", shapes=[(hidden_size, inner)])
        self.gate = loader.linear(f"{name}_gate", shapes=[(1, hidden_size)]) if gated else None

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, hidden_size] -> [T, hidden_size]."""
        y = self.down(self.ops.silu_mul(self.gate_up(x)))
        return y if self.gate is None else self.ops.sigmoid_mul(y, self.gate(x))


class Mixture:
    """A router chooses a few experts for each token and weighs what they make of it."""

    def __init__(self, name: str, config: MixtureConfig, hidden_size: int, loader: Loader) -> None:
        self.ops = loader.ops
        self.num_active, self.normalize = config.num_active, config.normalize
        self.router = loader.linear(f"{name}.gate", shapes=[(config.num_experts, hidden_size)])
        self.experts = load_experts(
            f"{name}.experts", config.num_experts, config.intermediate_size, hidden_size, loader
        )
        self.shared = None
        if config.shared_intermediate_size:
            self.shared = SharedExpert(f"{name}.shared_expert", config, hidden_size, loader)

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """x [T, hidden_size] -> what is to be added up, [T, hidden_size] each."""
        ids, weights = self.ops.route(self.router(x, torch.float32), self.num_active, self.normalize)
        mixed = self.experts(x, ids, weights)
        return (mixed,) if self.shared is None else (self.shared(x), mixed)
