"""Whatever a drafter proposes, however sequences are batched, cut, preempted and cached: the text is the same."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from generation import SETTINGS, WAYS, ids
from generation import generate as run

from blade import Config, DraftOptions, EngineConfig, EngineStats, ModelOptions
from blade.assembly import Assembly, choose, load_model
from blade.plugins import load

if TYPE_CHECKING:
    from pathlib import Path

    from blade.contracts import Model

DRAFTERS = ["suffix", "ngram", "model", "suffix+model", "model, all verified"]


@pytest.fixture(scope="module")
def target(tiny_llama: Path, tiny_draft: Path) -> tuple[Assembly, Model, Model]:
    options = ModelOptions(model=str(tiny_llama), dtype="float32", max_model_len=256)
    draft = DraftOptions(model=str(tiny_draft), dtype="float32")
    assembly = choose(Config(model=options, draft=draft, engine=EngineConfig(threads=1)), load())
    assert assembly.draft is not None
    return assembly, load_model(assembly), load_model(assembly.draft)


def generate(target: tuple[Assembly, Model, Model], drafters: str | None, params: dict[str, Any], **engine: Any) -> Any:
    """(what was sampled for each prompt, the engine's statistics)."""
    assembly, model, draft_model = target
    names = tuple((drafters or "").partition(",")[0].split("+")) if drafters else ()
    adaptive = bool(drafters) and "all" not in str(drafters)
    drafting = "model" in names
    assembly = assembly if drafting else replace(assembly, draft=None)
    engine |= {"drafter": names, "adaptive_drafts": adaptive}
    return run(assembly, model, draft_model if drafting else None, params, **engine)


@pytest.fixture(scope="module")
def plain(target: Any) -> dict[str, Any]:
    return {name: generate(target, None, params)[0] for name, params in SETTINGS.items()}


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("drafters", DRAFTERS)
def test_drafts_do_not_change_the_text(target: Any, plain: dict[str, Any], drafters: str, settings: str) -> None:
    said, _ = generate(target, drafters, SETTINGS[settings])
    assert ids(said) == ids(plain[settings])
    for seq, other in zip(said, plain[settings], strict=True):
        for token, same in zip(seq, other, strict=True):
            assert token.logprob == pytest.approx(same.logprob, abs=1e-4)
            assert [top.token_id for top in token.top] == [top.token_id for top in same.top]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("drafters", ["suffix+model", "suffix+model, all verified"])
def test_nor_does_how_steps_are_made(target: Any, plain: dict[str, Any], drafters: str, way: str) -> None:
    said, stats = generate(target, drafters, SETTINGS["plain"], **WAYS[way])
    assert said == plain["plain"]
    assert stats.draft_tokens > 0 or "all" not in drafters  # on a busy machine none may seem to pay
    assert way != "little memory" or stats.preemptions > 0


def test_the_same_model_as_draft_is_always_right(target: Any, tiny_llama: Path) -> None:
    """At any temperature: it draws with the target's random numbers."""
    assembly, model, _ = target
    twin = replace(assembly, draft=replace(assembly, draft=None))
    for settings in ("greedy", "hot", "penalties"):
        _, stats = generate((twin, model, model), "model, all verified", SETTINGS[settings])
        assert stats.draft_tokens_accepted == stats.draft_tokens > 200
        (drafter,) = stats.drafters
        assert drafter.tokens_accepted / drafter.drafts_verified > 4


def test_what_is_counted(target: Any) -> None:
    stats: EngineStats = generate(target, "ngram, all verified", SETTINGS["greedy"])[1]
    (drafter,) = stats.drafters
    assert drafter.name == "ngram"
    assert drafter.tokens_verified == stats.draft_tokens
    assert drafter.tokens_accepted == stats.draft_tokens_accepted
    assert drafter.tokens_proposed >= drafter.tokens_verified >= drafter.tokens_accepted
    assert drafter.seconds > 0
    assert stats.steps < stats.generated_tokens


@pytest.mark.parametrize(
    ("way", "quant"),
    [
        *((way, "int8") for way in ("together", "small steps", "little memory", "no prefix cache")),
        ("little memory", "int4"),
        ("together", "fp8_e4m3"),
        ("small steps", "int4_affine"),
    ],
)
def test_nor_do_they_over_a_rounded_kv_cache(target: Any, way: str, quant: str) -> None:
    """Nor does how its steps are made: a token's KV is rounded once, whoever computes it."""
    expected, _ = generate(target, None, SETTINGS["plain"], kv_cache_quant=quant)
    said, stats = generate(target, "suffix+model, all verified", SETTINGS["plain"], kv_cache_quant=quant, **WAYS[way])
    assert said == expected
    assert stats.draft_tokens > 0
