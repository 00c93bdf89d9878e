"""The drafter "lookahead": lookahead decoding (Fu et al. 2024), which needs no second model."""

from typing import Any

from blade import hookimpl
from blade_lookahead.drafter import LookaheadDrafter


@hookimpl
def register_drafters(register: Any) -> None:
    register("lookahead", LookaheadDrafter)
