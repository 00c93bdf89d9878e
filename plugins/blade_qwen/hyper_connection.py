"""Hyper-connections (Zhu et al. 2024) as Qwen4-Exp has them: the residual stream is several, from which each part of a
layer reads a gated mean, and to each of which it adds what it made as strongly as that stream asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from blade.nn import DecoderConfig, Keys

if TYPE_CHECKING:
    from torch import Tensor

    from blade.contracts import Loader


@dataclass(slots=True, frozen=True)
class StreamsConfig:
    num: int  # residual streams
    rank: int  # of the matrix that their gates are made with

    @classmethod
    def read(cls, keys: Keys) -> StreamsConfig:
        return cls(keys.integer("hc_count", 4, minimum=2), keys.integer("hc_lowrank", 320))


class StreamNorm:
    """Root mean square norm of each stream by itself, with weights of its own, to which 1 is added."""

    def __init__(self, name: str, streams: StreamsConfig, config: DecoderConfig, loader: Loader) -> None:
        weight = loader.tensor(f"{name}.weight", (streams.num * config.hidden_size,), torch.float32)
        self.weight = weight.view(streams.num, config.hidden_size) + 1.0
        self.eps = config.rms_norm_eps

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, num, hidden_size] -> the same; in float32 inside."""
        return (F.rms_norm(x.float(), x.shape[-1:], eps=self.eps) * self.weight).to(x.dtype)


class StreamReader:
    """One vector out of all streams: each of their channels is gated by what all of them hold."""

    def __init__(self, name: str, streams: StreamsConfig, config: DecoderConfig, loader: Loader) -> None:
        self.num, width = streams.num, streams.num * config.hidden_size
        self.norm = StreamNorm(f"{name}.hc_norm", streams, config, loader)
        self.down = loader.linear(f"{name}.input_mix_weight_down", shapes=[(streams.rank, width)])
        self.up = loader.linear(f"{name}.input_mix_weight_up", shapes=[(width, streams.rank)])

    def __call__(self, streams: Tensor) -> Tensor:
        """streams [T, num, hidden_size] -> [T, hidden_size]."""
        return self.mixed(self.norm(streams))

    def mixed(self, normed: Tensor) -> Tensor:
        gates = self.up(F.silu(self.down(normed.flatten(1)) / self.num)).sigmoid()
        return (gates.view(normed.shape) * normed).mean(dim=1)


class HyperConnection(StreamReader):
    """Around one part of a layer."""

    def __init__(self, name: str, streams: StreamsConfig, config: DecoderConfig, loader: Loader) -> None:
        super().__init__(name, streams, config, loader)
        shape = (streams.num, streams.num * config.hidden_size)
        self.strength = loader.linear(f"{name}.block_inject_weight", shapes=[shape])

    def read(self, streams: Tensor) -> tuple[Tensor, Tensor]:
        """streams [T, num, hidden_size] -> what the part is given, [T, hidden_size], and how strongly each stream wants
        what it makes of it, [T, num, 1]."""
        normed = self.norm(streams)
        strengths = 2 * (self.strength(normed.flatten(1)) / self.num).sigmoid()
        return self.mixed(normed), strengths.unsqueeze(2)
