"""One uniform number per row, a pure function of (seed, position).

SplitMix64 (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014): the generator adds a
constant to a 64-bit state and hashes it, so the number at any position is had directly, without a state to carry. The
seed is hashed first, so that seeds near each other have unrelated streams.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

MASK = (1 << 64) - 1
GAMMA = np.uint64(0x9E3779B97F4A7C15)


def uniforms(seeds: Iterable[int], positions: Iterable[int]) -> NDArray[np.float64]:
    """[R] float64 in [0, 1), multiples of 2^-53. Of a seed the low 64 bits count."""
    stream = _mix(np.array([seed & MASK for seed in seeds], np.uint64) + GAMMA)
    bits = _mix(stream + (np.array([*positions], np.uint64) + np.uint64(1)) * GAMMA)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
