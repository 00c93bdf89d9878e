"""A few hundred broken checkpoints, and files beside the weights; `just fuzz` tries many more."""

from __future__ import annotations

from typing import TYPE_CHECKING

import file_mutations
import file_values
import pytest
from format_cases import CASES, RENAMED
from mutations import fuzz

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("case", [*CASES, *RENAMED])
def test_what_is_broken_is_refused_in_a_sentence_or_served(case: str) -> None:
    outcomes = fuzz(case, 25)
    assert outcomes["refused"] > 5


@pytest.mark.parametrize("case", file_mutations.CASES)
def test_broken_files_are_refused_in_a_sentence_or_read(case: str, tiny_llama: Path) -> None:
    assert file_mutations.fuzz(case, 15, tiny_llama)["refused"] > 0


@pytest.mark.parametrize("case", file_values.CASES)
def test_odd_values_are_refused_in_a_sentence_or_read(case: str, tiny_llama: Path) -> None:
    assert file_values.sweep(case, tiny_llama, every=37)["refused"] > 0
