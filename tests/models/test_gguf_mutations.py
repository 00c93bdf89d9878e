"""A few hundred broken GGUF files; `just fuzz-gguf` tries many more."""

from __future__ import annotations

import pytest
from gguf_mutations import ARCHITECTURES, fuzz

from blade.checkpoint.gguf import GGMLType

SOME = [kind.name for kind in (GGMLType.Q2_K, GGMLType.Q3_K, GGMLType.Q4_K, GGMLType.IQ4_XS, GGMLType.TQ1_0)]


@pytest.mark.parametrize("case", [*ARCHITECTURES, *SOME])
def test_what_is_broken_is_refused_in_a_sentence_or_served(case: str) -> None:
    outcomes = fuzz(case, 10)
    assert outcomes["refused"] > 2
