"""What a decode step costs by the number of its tokens: measured at start, corrected by every step since."""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

MOST_TOKENS = 256  # of a step that speculation adds to: far beyond, every token costs its full price
PLAIN, WHOLE, LOCAL = 0.1, 0.05, 0.05  # how much of an error is believed: see learn
REACH = 12  # numbers of tokens beside one that are like it, the less the farther


class StepCosts:
    """Seconds of a step of decodes and verifications, by its tokens.

    The curve's shape is the model's and the device's: weights are read once however many tokens there are, until
    arithmetic takes longer than memory. Its height drifts with contexts and with what else the machine does.
    """

    def __init__(self, measured: Mapping[int, float], new_shape: float | None = None) -> None:
        """`measured`: tokens -> seconds, at least one pair. Between two numbers of tokens the curve is a line, and it
        never falls: what took longer than a larger step did was disturbed. `new_shape`: see warm_up.Measured."""
        curve: list[tuple[int, float]] = []
        for num, seconds in sorted(measured.items(), reverse=True):
            curve.append((num, min(seconds, curve[-1][1]) if curve else seconds))
        self._shape = [_between(curve[::-1], num) for num in range(MOST_TOKENS + 1)]
        self._height = 1.0
        self.measured = sorted(measured)  # numbers of tokens
        self.new_shape = new_shape

    def seconds(self, num_tokens: int) -> float:
        if num_tokens <= MOST_TOKENS:
            return self._height * self._shape[num_tokens]
        return self.seconds(MOST_TOKENS) + (num_tokens - MOST_TOKENS) * self.per_token

    @property
    def per_token(self) -> float:
        """Seconds one token more costs in a large step."""
        half = MOST_TOKENS // 2
        return max(0.0, self.seconds(MOST_TOKENS) - self.seconds(half)) / half

    def learn(self, num_seqs: int, num_tokens: int, seconds: float) -> None:
        """A step of so many sequences and tokens took so long. One outlier moves little.

        Without drafts it tells of the curve's height alone. Were it to bend the curve where all steps without drafts
        are, those with drafts would seem to cost next to nothing more.
        """
        if num_tokens > MOST_TOKENS or seconds <= 0:
            return
        error = min(2.0, max(0.5, seconds / self.seconds(num_tokens)))
        if num_tokens == num_seqs:
            self._height *= error**PLAIN
            return
        self._height *= error**WHOLE
        for num in range(max(num_seqs + 1, num_tokens - REACH), min(MOST_TOKENS, num_tokens + REACH) + 1):
            self._shape[num] *= error ** (LOCAL * (1 - abs(num - num_tokens) / (REACH + 1)))


def _between(curve: list[tuple[int, float]], num: int) -> float:
    """Along the line through the neighbours of `num`; beyond the end as steeply as from the first point to the last."""
    i = bisect_left(curve, (num,))
    if i == len(curve):
        (a, low), (b, high) = curve[0], curve[-1]
        return high + (num - b) * (high - low) / max(1, b - a)
    if i == 0 or curve[i][0] == num:
        return curve[i][1]
    (a, low), (b, high) = curve[i - 1], curve[i]
    return low + (num - a) * (high - low) / (b - a)
