"""Scales that make channels easier to round: x W^T = (x / s) (W diag(s))^T, and what comes before is divided by s.

AWQ (Lin et al. 2024) searches the s under which the rounded weights do least harm; SmoothQuant (Xiao et al. 2023)
moves the outliers of activations into the weights until both are as hard to round. Which module comes before a linear
is known by the names of Llama-like layers; for others both are refused.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch

from blade import ConfigError
from blade_quantize import grids

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from torch import Tensor

    from blade import ModelConfig
    from blade.contracts import Weights
    from blade_quantize.grids import Grid
    from blade_quantize.scheme import Scheme

KNOWN = {  # whose norms multiply by their weight as it is, and whose layers are made of what PRODUCERS says
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen3MoeForCausalLM",
}
PRODUCERS = (  # of what the linears on the left multiply
    (r"(.+)\.self_attn\.[qkv]_proj", r"\1.input_layernorm"),
    (r"(.+)\.mlp\.(?:gate|up)_proj", r"\1.post_attention_layernorm"),
    (r"(.+)\.self_attn\.o_proj", r"\1.self_attn.v_proj"),
    (r"(.+)\.down_proj", r"\1.up_proj"),
)
WITHOUT = r".+\.experts\.\d+\.(?:gate|up)_proj|.+\.shared_expert\.(?:gate|up)_proj"  # they share what comes before
POWERS = tuple(step / 12 for step in range(12))  # of the activations' size, tried by AWQ
ROWS = 512  # of a matrix, about, on which they are tried
BALANCE = 0.5  # of SmoothQuant
LEAST = 1e-4


class Smoother:
    """Finds the scales of each stack of linears, and keeps what the modules before are to be multiplied by."""

    def __init__(self, scheme: Scheme, config: ModelConfig, weights: Weights, grid: Grid) -> None:
        """Raises ConfigError for a family whose layers are not known."""
        if config.architecture not in KNOWN:
            raise ConfigError(
                f"--algo {scheme.algo} does not know how the layers of {config.architecture} are put together.",
                f"It knows {', '.join(sorted(KNOWN))}. Use --algo gptq.",
            )
        self.factors: dict[str, Tensor] = {}  # module -> [N] float32, for the rows of its weight and its bias
        self._scheme, self._weights, self._grid = scheme, weights, grid
        self._grouped_query = config.num_heads != config.num_kv_heads

    def __call__(self, prefixes: Seq[str], w: Tensor, x: Tensor) -> Tensor | None:
        """s [K] for the stack w [N, K] under `prefixes`, which multiplies x [T, K]; None: it stays as it is."""
        producer = self._producer(prefixes)
        if producer is None:
            return None
        s = awq(w, x, self._scheme.group or w.shape[1], self._grid) if self._scheme.smooths == "awq" else smooth(w, x)
        if not producer.endswith("norm"):
            self.factors[producer] = 1 / s
            return s
        norm = self._weights.get(f"{producer}.weight")
        divided = (norm.to(s.device, torch.float32) / s).to(norm.dtype).float()
        s = torch.where(divided == 0, 1, norm.to(s.device, torch.float32) / divided)  # as the norm can store it
        self.factors[producer] = 1 / s
        return s

    def _producer(self, prefixes: Seq[str]) -> str | None:
        if re.fullmatch(WITHOUT, prefixes[0]):
            return None
        for pattern, producer in PRODUCERS:
            match = re.fullmatch(pattern, prefixes[0])
            if match is None:
                continue
            name = match.expand(producer)
            linear = not name.endswith("norm")
            if linear and (self._scheme.smooths == "smoothquant" or (name.endswith("v_proj") and self._grouped_query)):
                return None
            return name
        raise ConfigError(
            f"--algo {self._scheme.algo} does not know what comes before {prefixes[0]}.",
            "Use --algo gptq.",
        )


def smooth(w: Tensor, x: Tensor) -> Tensor:
    """SmoothQuant's s [K]: max|X_j|^BALANCE / max|W_j|^(1 - BALANCE)."""
    active, weight = x.abs().amax(0), w.abs().amax(0)
    s = active.clamp(min=LEAST) ** BALANCE / weight.clamp(min=LEAST) ** (1 - BALANCE)
    return torch.where((active == 0) | (weight == 0), 1, s.clamp(min=LEAST))


def awq(w: Tensor, x: Tensor, group: int, grid: Grid) -> Tensor:
    """AWQ's s [K]: the mean size of each channel of x, to that of POWERS under which some rows of W, evenly spread,
    have the least || x (W - W')^T ||."""
    w = w[:: max(1, len(w) // ROWS)]
    size = x.abs().mean(0).clamp(min=LEAST)
    hessian = x.T @ x
    best, least = torch.ones_like(size), torch.inf
    for power in POWERS:
        s = size**power
        s /= (s.amax() * s.amin()).sqrt()
        scaled = w * s
        codes = grids.round_matrix(scaled, *(found := grids.fit(scaled, group, grid)), grid)
        change = grids.values(codes, *found).div_(s).sub_(w)
        error = float((change @ hessian).mul_(change).sum())
        if error < least:
            best, least = s, error
    return best
