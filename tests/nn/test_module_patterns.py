"""Patterns of settings find their modules, and none can keep the loading busy."""

from __future__ import annotations

import time

import pytest

from blade import CheckpointError
from blade.nn import module_patterns
from blade.nn.module_patterns import ModulePatterns

UP = "model.layers.12.mlp.experts.3.up_proj"


def found(pattern: str, name: str = UP, method: str = "match") -> bool:
    patterns: ModulePatterns[int] = ModulePatterns(method)
    patterns.add("x", pattern, 1)
    assert len(patterns) == 1
    return patterns.find(name) == 1


@pytest.mark.parametrize(
    ("pattern", "is_found"),
    [
        (r".*\.mlp\..*", True),
        (r".*layers\..*\.mlp\..*_proj.*", True),
        (r"model\.layers\.(?:[0-9]|1[0-9])\.mlp\.experts\.\d+\.(gate|up)_proj$", True),
        (r"^(?!.*experts).*up_proj", False),
        (r"(language_)?model\.layers\.\d{1,3}\.", True),
        (r"mlp", False),
        (r"[)*]*model", True),
    ],
)
def test_patterns_as_tools_write_them(pattern: str, is_found: bool) -> None:
    assert found(pattern) is is_found


def test_the_first_that_matches_counts() -> None:
    patterns: ModulePatterns[str] = ModulePatterns("fullmatch")
    for pattern in ("model", r"model\..*up_proj", ".*"):
        patterns.add("x", pattern, pattern)
    assert patterns.find(UP) == r"model\..*up_proj"
    assert patterns.find("lm_head") == ".*"
    assert patterns.find("lm_head.weight", "model") == "model"
    assert found("mlp", method="search")
    assert not found(".*", "x" * 201)


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("(a*)*b", "could take too long to match"),
        ("(a|a)+b", "could take too long"),
        ("(?:a{1,9}){2,}b", "could take too long"),
        (".*.*.*.*.*b", "could take too long"),
        ("a?" * 30 + "a" * 30, "could take too long"),
        ("(((a*)))*", "could take too long"),
        ("(?x)(a*)#(\n*b", "is too long, or has comments"),
        ("(a*)(?#[)*]b", "is too long, or has comments"),
        ("a" * 1001, "is too long, or has comments"),
        ("(", "is no regular expression"),
        ("(" * 500 + ")" * 500, "is no regular expression"),
    ],
)
def test_patterns_that_could_run_for_ever_are_refused(pattern: str, words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        found(pattern)
    assert words in str(caught.value)
    assert str(caught.value).startswith("config.json: x: ")
    assert len(str(caught.value)) < 200


def test_all_together_have_a_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_patterns, "SECONDS", 0.02)
    patterns: ModulePatterns[int] = ModulePatterns()
    for _ in range(1000):
        patterns.add("x", ".*a.*a.*a.*b", 1)
    started = time.thread_time()
    with pytest.raises(CheckpointError, match="x: the patterns take too long"):
        patterns.find("a" * 80)
    assert time.thread_time() - started < 2
