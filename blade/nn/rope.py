"""Rotary position embedding (RoFormer, Su et al. 2021): by which angle a position turns each pair of channels.

The scaled kinds are those of transformers' `rope_parameters`, with its arithmetic.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(slots=True, frozen=True)
class Rope:
    """A rotary embedding without scaling; its subclasses scale it."""

    theta: float
    rotary_dim: int  # channels of a head that turn, in pairs
    trained_context: int  # tokens

    @property
    def max_context(self) -> int:
        """Tokens it is good for."""
        return self.trained_context

    def frequencies(self, num_positions: int) -> Tensor:
        """Radians per token, float32: [rotary_dim / 2], or [num_positions, rotary_dim / 2] where positions differ."""
        return 1.0 / self.theta ** self.exponents()

    def table(self, num_positions: int) -> Tensor:
        """[num_positions, rotary_dim] float32: the cosines of each position's angles, then their sines."""
        angles = torch.arange(num_positions, dtype=torch.float32)[:, None] * self.frequencies(num_positions)
        return torch.cat((angles.cos(), angles.sin()), dim=1)

    def exponents(self) -> Tensor:
        return torch.arange(0, self.rotary_dim, 2, dtype=torch.float32) / self.rotary_dim


@dataclass(slots=True, frozen=True)
class LinearRope(Rope):
    """Positions are squeezed by a factor (Chen et al. 2023)."""

    factor: float

    @property
    def max_context(self) -> int:
        return int(self.trained_context * self.factor)

    def frequencies(self, num_positions: int) -> Tensor:
        return Rope.frequencies(self, num_positions) / self.factor


@dataclass(slots=True, frozen=True)
class DynamicRope(LinearRope):
    """Dynamic NTK scaling: the further a context grows beyond the trained one, the slower its pairs turn.

    transformers turns all tokens of a forward pass by the length which that pass reaches, and leaves earlier keys in
    the cache as they are: beyond the trained context its result depends on how a prompt was cut into passes. Here
    position p always turns by the length p + 1, so that chunks change nothing and prefixes can be shared. It equals
    transformers within the trained context, and beyond it where tokens come one per pass, as generated ones do. It
    differs where a pass of several tokens ends beyond it.
    """

    def frequencies(self, num_positions: int) -> Tensor:
        lengths = torch.arange(1, num_positions + 1).clamp(min=self.trained_context)[:, None]
        stretch = self.factor * lengths / self.trained_context - (self.factor - 1)
        return 1.0 / (self.theta * stretch ** (self.rotary_dim / (self.rotary_dim - 2))) ** self.exponents()


@dataclass(slots=True, frozen=True)
class Llama3Rope(Rope):
    """Llama 3.1: slow pairs are slowed by a factor, fast ones are not, those between are blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float  # at least the low one
    original_context: int  # tokens, before the scaling

    def frequencies(self, num_positions: int) -> Tensor:
        fast = Rope.frequencies(self, num_positions)
        turns = self.original_context * fast / (2 * math.pi)  # in the original context
        between = max(self.high_freq_factor - self.low_freq_factor, 1e-30)  # of Llama 4's there are none
        share = (turns - self.low_freq_factor) / between
        return torch.lerp(fast / self.factor, fast, share.clamp(0, 1))


@dataclass(slots=True, frozen=True)
class YarnRope(Rope):
    """YaRN (Peng et al. 2023): as Llama 3.1's, blended by the pair's place instead, and all angles weigh more."""

    factor: float
    original_context: int  # tokens, before the scaling
    beta_fast: float  # pairs that turn more often than this in the original context are left alone
    beta_slow: float  # pairs that turn less often are slowed by the whole factor
    truncate: bool  # these two bounds fall on whole pairs
    magnitude: float  # multiplies cosines and sines

    @property
    def max_context(self) -> int:
        return max(self.trained_context, int(self.original_context * self.factor))

    def frequencies(self, num_positions: int) -> Tensor:
        fast = Rope.frequencies(self, num_positions)
        low, high = self._place(self.beta_fast), self._place(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.rotary_dim - 1)
        ramp = (torch.arange(self.rotary_dim // 2) - low) / ((high - low) or 0.001)
        return torch.lerp(fast, fast / self.factor, ramp.clamp(0, 1))

    def table(self, num_positions: int) -> Tensor:
        return Rope.table(self, num_positions).mul_(self.magnitude)

    def _place(self, turns: float) -> float:
        """Of the pair, if there were one, that turns so often in the original context."""
        return self.rotary_dim * math.log(self.original_context / (turns * 2 * math.pi)) / (2 * math.log(self.theta))


@dataclass(slots=True, frozen=True)
class LongRope(Rope):
    """LongRoPE (Ding et al. 2024): each pair is slowed by a factor of its own, and all angles weigh more.

    There are factors for contexts within the original one and for longer ones. transformers takes those that belong
    to the length of each pass, and leaves earlier keys in the cache as they are. Here, as in vLLM, the longest context
    that is served decides for all, so that prefixes can be shared: for the short factors serve no more than the
    original one.
    """

    original_context: int  # tokens, before the scaling
    short_factors: tuple[float, ...]  # of rotary_dim / 2 pairs
    long_factors: tuple[float, ...]
    magnitude: float  # multiplies cosines and sines

    def frequencies(self, num_positions: int) -> Tensor:
        factors = self.long_factors if num_positions > self.original_context else self.short_factors
        return 1.0 / (torch.tensor(factors) * self.theta ** self.exponents())

    def table(self, num_positions: int) -> Tensor:
        return Rope.table(self, num_positions).mul_(self.magnitude)
