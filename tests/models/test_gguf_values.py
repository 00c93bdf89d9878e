"""Some of the files of gguf_values.py; `just fuzz-values` tries all of them."""

from __future__ import annotations

import pytest
from gguf_values import CASES, sweep


@pytest.mark.parametrize("case", CASES)
def test_odd_metadata_is_refused_in_a_sentence_or_served(case: str) -> None:
    outcomes = sweep(case, every=23)
    assert outcomes["refused"] > outcomes["read"] > 10
