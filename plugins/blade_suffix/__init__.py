"""The drafter "suffix": the text goes on as it did before."""

from typing import Any

from blade import hookimpl


@hookimpl
def register_drafters(register: Any) -> None:
    def make(config: Any, draft_model: Any) -> Any:
        from blade_suffix.drafter import SuffixDrafter

        return SuffixDrafter()

    register("suffix", make)
