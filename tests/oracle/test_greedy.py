"""Greedy ids equal transformers' on the real demo weights, however they are batched, chunked, cached or preempted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from greedy import WAYS, decode, prepare

from blade.assembly import Assembly
from blade.contracts import Model

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf: Path) -> tuple[Assembly, Model]:
    return prepare(smollm2_gguf)


@pytest.mark.demo
@pytest.mark.parametrize("way", WAYS)
def test_smollm2(smollm2: tuple[Assembly, Model], way: str) -> None:
    cases = json.loads((HERE / "smollm2.json").read_text())
    cases, num_tokens = (cases, 24) if way in ("batch of 16", "forced preemption") else (cases[::5], 16)
    found, stats = decode(*smollm2, cases, num_tokens, **WAYS[way])
    assert found == [case["output"][:num_tokens] for case in cases]
    assert (stats.preemptions > 0) == (way == "forced preemption")


@pytest.mark.demo
def test_qwen(qwen_gguf: Path) -> None:
    cases: list[dict[str, Any]] = json.loads((HERE / "qwen.json").read_text())[:14:3]
    found, _ = decode(*prepare(qwen_gguf), cases, 12)
    assert found == [case["output"][:12] for case in cases]
