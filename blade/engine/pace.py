"""How much of prompts a step may take, so that nobody waits long for a next token, or for a first one behind others.

A step is as long for those who only decode as it is for the chunk beside them (Sarathi-Serve, Agrawal et al. 2024). How
many tokens go into a given time is learnt from the steps themselves: on a large GPU it is more than any chunk has, on a
small CPU a few hundred.
"""

from __future__ import annotations

LEAST = 256  # tokens of a chunk: smaller ones make prompts slower, for weights are read and unpacked for each
TELLING = 64  # tokens of prompts that a step must have to tell anything about their speed
WEIGHT = 0.3  # of the last step, in what is believed


class Pace:
    """Bounds the tokens of prompts in a step by the time they take."""

    def __init__(self, seconds: float, most: int) -> None:
        """`seconds` of a step; 0: only `most` tokens are a bound."""
        self._seconds = seconds
        self._most = most
        self._rate = 0.0  # tokens per second

    @property
    def num_tokens(self) -> int:
        """Of prompts in the next step, at most."""
        if not self._seconds:
            return self._most
        return min(self._most, max(LEAST, int(self._rate * self._seconds)))

    def learn(self, num_prompt_tokens: int, num_tokens: int, seconds: float) -> None:
        """A step of `num_tokens`, so many of them of prompts, has taken `seconds`."""
        if num_prompt_tokens < TELLING:
            return
        rate = num_tokens / seconds
        self._rate += WEIGHT * (rate - self._rate) if self._rate else rate
