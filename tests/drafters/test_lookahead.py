"""Lookahead decoding: what its window finds out, and that the text stays the same however trees are verified."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from generation import PROMPTS, SETTINGS, WAYS, generate, ids

from blade import Config, ConfigError, EngineConfig, ModelOptions, Sampled, SamplingParams, Sequence
from blade.assembly import Assembly, choose, load_model
from blade.engine.verify import accept
from blade.plugins import load
from blade_lookahead.drafter import LookaheadDrafter
from blade_lookahead.pool import MOST_FIRSTS, Pool
from blade_lookahead.window import Tree, Window

if TYPE_CHECKING:
    from pathlib import Path

    from blade.contracts import Model

SMALL: dict[str, Any] = {"lookahead_window_size": 3, "lookahead_ngram_size": 3, "lookahead_guess_set_size": 3}


def says(token_id: int) -> int:
    """A model that looks at the last token alone; it comes back to it after 97 others."""
    return (5 * token_id + 1) % 97 if token_id != 24 else 24  # 24 follows itself


def decode(drafter: LookaheadDrafter, prompt_ids: list[int], num_tokens: int, limit: int = 99) -> tuple[list[int], int]:
    """(the output of `says`, the number of steps that it took)."""
    seq, num_steps = Sequence(1, prompt_ids, SamplingParams(max_tokens=num_tokens), output_ids=[3]), 0
    while len(seq.output_ids) < num_tokens:
        (draft,) = drafter.propose([seq], [min(limit, drafter.tree_size)])
        seq.draft_ids, seq.draft_parents = draft.ids, draft.parents
        sampled = [Sampled(says(token_id)) for token_id in (seq.output_ids[-1], *draft.ids)]
        if draft.ids:
            drafter.sampled(seq, [token.token_id for token in sampled])
        kept = accept(draft.ids, sampled, draft.parents)
        assert isinstance(kept, list)
        seq.output_ids += [token.token_id for token in kept]
        seq.draft_ids, num_steps = [], num_steps + 1
    drafter.forget(seq)
    return seq.output_ids[:num_tokens], num_steps


def plain(num_tokens: int) -> list[int]:
    output = [3]
    while len(output) < num_tokens:
        output.append(says(output[-1]))
    return output


@pytest.mark.parametrize(("window", "ngram", "guesses"), [(1, 2, 1), (5, 4, 5), (8, 3, 2), (4, 5, 4)])
def test_the_window_finds_n_grams_of_a_text_that_never_repeats(window: int, ngram: int, guesses: int) -> None:
    sizes = {"lookahead_window_size": window, "lookahead_ngram_size": ngram, "lookahead_guess_set_size": guesses}
    drafter = LookaheadDrafter(EngineConfig(**sizes), None)
    prompt = [i * 29 % 97 for i in range(97)]
    output, num_steps = decode(drafter, prompt, 90)
    assert output == plain(90)
    assert len(set(output)) == 90
    assert num_steps < (90 if window < 4 else 70)
    assert not drafter._known


def test_a_text_that_repeats_is_taken_several_tokens_at_a_time() -> None:
    drafter = LookaheadDrafter(EngineConfig(), None)
    output, num_steps = decode(drafter, [i * 29 % 97 for i in range(97)], 400)
    assert output == plain(400)
    assert num_steps < 200
    for limit in (1, 2, 7, 20):  # what is cut, as at the end of a request, is not learnt from
        assert decode(drafter, [1, 2, 3], 60, limit)[0] == plain(60)


def test_another_drafters_tree_teaches_nothing() -> None:
    drafter = LookaheadDrafter(EngineConfig(**SMALL), None)
    seq = Sequence(1, [1, 2, 3, 4], SamplingParams(max_tokens=9), output_ids=[5])
    (draft,) = drafter.propose([seq], [drafter.tree_size])
    before = [level[:] for level in drafter._known[1].window._levels]
    seq.draft_ids, seq.draft_parents = [draft.ids[0] + 1], [-1]
    drafter.sampled(seq, [1, 2])
    assert drafter._known[1].window._levels == before


def test_a_long_prompt_is_taken_in_over_several_steps() -> None:
    drafter = LookaheadDrafter(EngineConfig(**SMALL), None)
    seq = Sequence(1, [7, 8, 9, *range(100, 6000)], SamplingParams(max_tokens=9), output_ids=[7])
    assert not drafter.propose([seq], [8])[0].ids
    (draft,) = drafter.propose([seq], [8])
    assert draft.ids[:2] == [8, 9]  # as it went on the first time
    assert draft.evidence == 1


def test_the_latest_n_grams_are_kept_and_come_first() -> None:
    pool = Pool(2)
    for rest in ((2, 3), (4, 5), (2, 3), (6, 7)):
        pool.add([1, *rest])
    assert pool.after(1) == [(6, 7), (2, 3)]
    assert pool.after(2) == []
    for first in range(2, MOST_FIRSTS + 2):
        pool.add([first, 0])
    assert pool.after(1) == []
    assert pool.after(2) == [(0,)]


def test_a_tree_shares_what_its_paths_have_in_common_and_ends_where_it_is_full() -> None:
    tree = Tree(4)
    assert tree.add_path(-1, (5, 6)) == 1
    assert tree.add_path(-1, (5, 7)) == 2
    assert tree.add_path(-1, (8, 9)) is None
    assert tree.add_path(-1, (5, 6)) == 1
    assert (tree.ids, tree.parents) == ([5, 6, 7, 8], [-1, 0, 0, -1])


def test_columns_move_up_a_level_and_keep_their_places() -> None:
    window = Window([1, 2, 3], 3, 3)
    window._levels = [[0, 1, 2], [11, 12, 13], [22, 23, 24]]
    assert window.advance(9, [33, None, 35], 1) == [[9, 11, 22, 33], [2, 13, 24, 35]]
    assert window._levels == [[11, 12, 13], [22, 23, 24], [33, 23, 35]]
    window.advance(9, [1, 2, 3], 2)
    assert window._levels == [[23, 24, 22], [23, 35, 33], [2, 3, 1]]


# ------------------------------------------------------------------------------------------ with a model


@pytest.fixture(scope="module")
def target(tiny_llama: Path) -> tuple[Assembly, Model]:
    options = ModelOptions(model=str(tiny_llama), dtype="float32", max_model_len=256)
    assembly = choose(Config(model=options, engine=EngineConfig(threads=1)), load())
    return assembly, load_model(assembly)


def run(target: tuple[Assembly, Model], params: dict[str, Any], drafters: str | None = None, **engine: Any) -> Any:
    assembly, model = target
    names = tuple(drafters.split("+")) if drafters else ()
    return generate(assembly, model, None, params, **{"drafter": names, "adaptive_drafts": False} | engine)


@pytest.mark.parametrize("settings", SETTINGS)
def test_trees_do_not_change_the_text(target: Any, settings: str) -> None:
    expected, _ = run(target, SETTINGS[settings])
    said, stats = run(target, SETTINGS[settings], "lookahead")
    assert ids(said) == ids(expected)
    for seq, other in zip(said, expected, strict=True):
        for token, same in zip(seq, other, strict=True):
            assert token.logprob == pytest.approx(same.logprob, abs=1e-4)
    (drafter,) = stats.drafters
    assert drafter.tokens_accepted > 0


@pytest.mark.parametrize("way", WAYS)
def test_nor_does_how_steps_are_made(target: Any, way: str) -> None:
    """With plain sequences and another's chains in the same steps, preempted, cut, found in the prefix cache."""
    rounds = 2 if way == "together" else 1
    expected, _ = run(target, SETTINGS["plain"], rounds=rounds)
    said, stats = run(target, SETTINGS["plain"], "lookahead", rounds=rounds, **WAYS[way])
    assert ids(said) == ids(expected)
    assert way != "little memory" or stats.preemptions > 0
    assert stats.draft_tokens_accepted > 0


def test_nor_do_several_drafters_or_the_choice_of_what_pays(target: Any) -> None:
    expected, _ = run(target, SETTINGS["greedy"])
    for drafters, adaptive in (("ngram+lookahead", False), ("lookahead", True)):
        said, _ = run(target, SETTINGS["greedy"], drafters, adaptive_drafts=adaptive, **SMALL)
        assert ids(said) == ids(expected)


@pytest.mark.parametrize("quant", ["int8", "mix_i8i4"])
def test_nor_does_a_rounded_kv_cache(target: Any, quant: str) -> None:
    expected, _ = run(target, SETTINGS["greedy"], prompts=PROMPTS[:4], kv_cache_quant=quant)
    said, _ = run(target, SETTINGS["greedy"], "lookahead", prompts=PROMPTS[:4], kv_cache_quant=quant)
    assert ids(said) == ids(expected)


# ------------------------------------------------------------------------------------------ at start


def test_more_than_a_row_can_see_is_refused() -> None:
    sizes = {"lookahead_window_size": 15, "lookahead_ngram_size": 5, "lookahead_guess_set_size": 15}
    engine = EngineConfig(drafter=("lookahead",), **sizes)
    with pytest.raises(ConfigError, match="would have 119 tokens verified in a step, of at most 63"):
        choose(Config(model=ModelOptions(model="nowhere"), engine=engine), load())  # before anything is looked for
    with pytest.raises(ConfigError, match="--lookahead-ngram-size"):
        EngineConfig(lookahead_ngram_size=1)


def test_a_device_whose_attention_knows_no_trees_refuses_it_by_name(
    target: tuple[Assembly, Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    assembly, _ = target
    config = replace(assembly.config, engine=EngineConfig(threads=1, drafter=("lookahead",)))
    assert choose(config, load()).drafters == ("lookahead",)
    monkeypatch.setattr(type(assembly.attention), "trees", False)
    with pytest.raises(ConfigError, match="--drafter lookahead drafts trees, which --attention paged cannot verify on"):
        choose(config, load())
