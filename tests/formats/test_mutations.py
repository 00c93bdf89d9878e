"""A few hundred broken checkpoints; `just fuzz` tries many more."""

from __future__ import annotations

import pytest
from format_cases import CASES, RENAMED
from mutations import fuzz


@pytest.mark.parametrize("case", [*CASES, *RENAMED])
def test_what_is_broken_is_refused_in_a_sentence_or_served(case: str) -> None:
    outcomes = fuzz(case, 25)
    assert outcomes["refused"] > 5
