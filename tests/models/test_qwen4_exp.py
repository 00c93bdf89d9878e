"""Qwen4-Exp: its n-grams, its context, and what of its checkpoints is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from checkpoints import Reference, make_reference
from stepper import Stepper, all_together, one_by_one
from test_hybrid_engine import WAYS, generate, greedy, opened, written

from blade import CheckpointError
from blade.assembly import Assembly
from blade.nn import Loader
from blade.nn.lora import Adapters
from blade.testing import TensorWeights
from blade.types import LowRank
from blade_native import paged_attention
from blade_qwen.ngrams import multipliers, ranges
from blade_qwen.qwen4_exp import Qwen4Exp

if TYPE_CHECKING:
    from blade.contracts import Model

NGRAMS = "model.layers.2.ple.ple_embedding"


@pytest.fixture(scope="module")
def exp() -> Reference:
    return make_reference("qwen4 exp ngrams")


@pytest.fixture(scope="module")
def loaded(exp: Reference, tmp_path_factory: pytest.TempPathFactory) -> tuple[Assembly, Model]:
    return opened(written(exp.config, exp.weights.tensors, tmp_path_factory.mktemp("tiny-exp")))


@pytest.fixture(scope="module")
def sparse() -> Reference:
    return make_reference("qwen4 exp sparse")


@pytest.fixture(scope="module")
def loaded_sparse(sparse: Reference, tmp_path_factory: pytest.TempPathFactory) -> tuple[Assembly, Model]:
    return opened(written(sparse.config, sparse.weights.tensors, tmp_path_factory.mktemp("tiny-sparse")))


@pytest.fixture(scope="module")
def expected_sparse(sparse: Reference) -> list[tuple[list[int], list[int]]]:
    return greedy(sparse)


@pytest.fixture(scope="module")
def expected(exp: Reference) -> list[tuple[list[int], list[int]]]:
    return greedy(exp)


@pytest.mark.parametrize("way", WAYS)
def test_tokens_do_not_depend_on_the_way(
    loaded: tuple[Assembly, Model], expected: list[tuple[list[int], list[int]]], way: str
) -> None:
    said, stats = generate(loaded, [prompt for prompt, _ in expected], 2, **WAYS[way])
    assert said == [[ids for _, ids in expected]] * 2
    assert (stats.prompt_tokens_cached > 0) == (way != "no prefix cache")


def test_n_grams_end_at_a_boundary(exp: Reference) -> None:
    """Else the test against transformers would not have seen one."""
    boundary = exp.config["eos_token_id"][0]
    assert any(boundary in prompt[:-3] for prompt in exp.prompts)


def test_n_grams_are_hashed_as_transformers_does_it(exp: Reference) -> None:
    config = Qwen4Exp().configure(exp.config).ngrams
    assert config is not None
    assert config.layers == (0, 2)
    tensors = exp.weights.tensors
    assert multipliers(config, 1) == tensors[f"{NGRAMS}.layer_multipliers"].tolist()
    assert ranges(config, 1) == tensors[f"{NGRAMS}.ngram_heads_vocab_sizes"].tolist()
    assert ranges(replace(config, smallest_range=1), 0) == [2, 3, 5, 7]


def test_what_checkpoints_say_of_hashes_may_be_missing_but_not_another(exp: Reference) -> None:
    names = [f"{NGRAMS}.{name}" for name in ("layer_multipliers", "ngram_heads_vocab_sizes", "ngram_heads_offsets")]
    tensors = {name: tensor for name, tensor in exp.weights.tensors.items() if name not in names}
    prompts, logits = exp.prompts[1:2], exp.logits[1]
    found = Stepper(Reference(exp.config, TensorWeights(tensors), prompts, [])).run(one_by_one([len(logits)], 100))
    assert float((found[0] - logits).abs().max()) < 1e-4
    for name in names:
        others = {**exp.weights.tensors, name: exp.weights.tensors[name] + 2}
        with pytest.raises(CheckpointError, match=f"{name} is not what follows from config.json's seed"):
            Stepper(replace(exp, weights=TensorWeights(others)))


@torch.inference_mode()
def test_an_adapter_changes_what_it_names_for_its_sequence(exp: Reference) -> None:
    table, linear = f"{NGRAMS}.ngram_embedding", "model.layers.1.attn_hyper_connection.input_mix_weight_down"
    torch.manual_seed(0)
    weights = Qwen4Exp().weights(exp.config, exp.weights)
    changed = {name: weights.get(name) for name in weights.names()}
    updates = {}
    for prefix in (table, linear):
        n, k = weights.shape(f"{prefix}.weight")
        n, k = (k, n) if prefix == table else (n, k)
        update = LowRank(torch.randn(2, k), torch.randn(n, 2), 0.3, of_table=prefix == table)
        delta = update.scale * update.b @ update.a
        updates[prefix] = update
        changed[f"{prefix}.weight"] = changed[f"{prefix}.weight"] + (delta.T if prefix == table else delta)
    stepper, merged = Stepper(exp), Stepper(replace(exp, weights=TensorWeights(changed)))
    adapters = Adapters(stepper.ops, torch.float32)
    loader = Loader(weights, stepper.ops, paged_attention(stepper.ops), torch.float32, adapters=adapters)
    model = Qwen4Exp().build(stepper.model.config, loader)
    stepper.forward = lambda batch: model.forward(batch, stepper.kv)
    adapter = adapters.make("x", updates)
    whose = [adapter] * 23 + [None] * 41
    with adapters.chosen(whose, whose):
        adapted, plain = stepper.step({1: (0, 23), 3: (0, 41)}).split((23, 41))
    torch.testing.assert_close(plain, exp.logits[3], rtol=0, atol=1e-4)
    torch.testing.assert_close(adapted, merged.step({1: (0, 23)}), rtol=0, atol=1e-4)
    assert float((adapted - exp.logits[1]).std()) > 0.1


def test_shards_are_put_together_by_number_and_let_go(exp: Reference) -> None:
    table = torch.arange(36.0).view(12, 3)
    shards = {f"x.ngram_embedding.shard_{i}.weight": table[i : i + 1] for i in reversed(range(12))}
    inner = TensorWeights(shards)
    weights = Qwen4Exp().weights(exp.config, inner)
    assert list(weights.names()) == ["x.ngram_embedding.weight"]
    assert weights.shape("x.ngram_embedding.weight") == (12, 3)
    found = weights.get("x.ngram_embedding.weight", torch.bfloat16)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found.float(), table)
    assert inner.released == list(reversed(shards))
    shards["x.ngram_embedding.shard_3.weight"] = table[:, :2]
    with pytest.raises(CheckpointError, match=r"shard_3\.weight has shape \(12, 2\)"):
        Qwen4Exp().weights(exp.config, inner)


def test_a_missing_shard_is_noticed(exp: Reference) -> None:
    tensors = dict(exp.weights.tensors)
    del tensors[f"{NGRAMS}.ngram_embedding.shard_2.weight"]
    with pytest.raises(CheckpointError, match=r"ngram_embedding\.weight has shape .+ by config.json it would be"):
        Stepper(replace(exp, weights=TensorWeights(tensors)))


def test_all_keys_are_seen_within_the_budget_and_not_beyond(sparse: Reference) -> None:
    """Of a longer text transformers leaves keys out, and so does blade: see test_decoders."""
    prompt, logits = sparse.prompts[0], sparse.logits[0]
    wider = replace(sparse, config=sparse.config | {"indexer_budget": 128}, prompts=[prompt])
    errors = (Stepper(wider).run(one_by_one([len(prompt)], 100))[0] - logits).abs().amax(dim=1)
    assert float(errors[:27].max()) < 1e-4  # 24 and 4, less 1
    assert float(errors[27:].max()) > 0.1


def test_where_all_keys_are_seen_nothing_is_kept_to_choose_them_by(exp: Reference) -> None:
    assert Qwen4Exp().configure(exp.config).key_selection is None
    assert not any(".indexer." in name for name in Qwen4Exp().weights(exp.config, exp.weights).names())


@pytest.mark.parametrize("way", WAYS)
def test_tokens_of_chosen_keys_do_not_depend_on_the_way(
    loaded_sparse: tuple[Assembly, Model], expected_sparse: list[tuple[list[int], list[int]]], way: str
) -> None:
    said, stats = generate(loaded_sparse, [prompt for prompt, _ in expected_sparse], 2, **WAYS[way])
    assert said == [[ids for _, ids in expected_sparse]] * 2
    assert (stats.prompt_tokens_cached > 0) == (way != "no prefix cache")
    assert stats.draft_tokens > 0 or way != "drafts, all verified"


def test_tokens_of_chosen_keys_outlive_preemption(
    loaded_sparse: tuple[Assembly, Model],
    expected_sparse: list[tuple[list[int], list[int]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of nine blocks 90 tokens leave room for 40, and not for those that both go on with."""
    plan = Assembly.plan_memory
    monkeypatch.setattr(Assembly, "plan_memory", lambda assembly: replace(plan(assembly), num_blocks=9))
    expected = [expected_sparse[i] for i in (0, 2, 3)] * 4
    said, stats = generate(loaded_sparse, [prompt for prompt, _ in expected], 1, prefix_cache=False)
    assert said == [[ids for _, ids in expected]]
    assert stats.preemptions > 0


def test_what_keys_are_chosen_by_counts_as_kv(loaded_sparse: tuple[Assembly, Model]) -> None:
    assembly, _ = loaded_sparse
    assert assembly.kv_spec.num_layers == 1
    assert assembly.block_bytes == assembly.attention.block_bytes(assembly.kv_spec) + 16 * 32 * 4
    assert assembly.max_context == 128


@pytest.mark.parametrize("storage", ["int8", "mix_i8i4"])
def test_chosen_keys_may_be_rounded(sparse: Reference, storage: str) -> None:
    """Which are chosen is what rounding before this layer leaves open, so that a text in chunks is compared."""
    lengths = [len(prompt) for prompt in sparse.prompts]
    whole, cut = (
        torch.cat(Stepper(sparse, storage=storage).run(steps))
        for steps in (one_by_one(lengths, 100), all_together(lengths, 0))
    )
    exact = torch.cat(sparse.logits)
    assert 1e-4 < float((whole - exact).std() / exact.std()) < 0.3
    assert float((whole - cut).abs().max()) < 0.01  # another order of sums may round to another number


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"indexer_budget": None}, "config.json has no indexer_budget"),
        ({"indexer_budget": 100}, "indexer_budget must be a multiple of indexer_compress_ratio, 8, not 100"),
        ({"indexer_kv_heads": 2}, "indexer_kv_heads must be 1, not 2"),
        ({"indexer_head_dim": 16}, "indexer_head_dim must be 32 or more, the channels of a head that are rotated"),
        ({"hc_count": 1}, "hc_count must be an integer from 2"),
        ({"hidden_act": "gelu"}, "hidden_act must be silu"),
        ({"output_gate_type": "tanh"}, "output_gate_type must be silu or sigmoid"),
        ({"layer_types": ["full_attention", "sliding_attention"] * 2}, "layer_types must be linear_attention or"),
        ({"layer_types": ["linear_attention"] * 4}, "one of them full_attention"),
        ({"ple_layer_ids": [0]}, "ple_layer_ids must be numbers of layers, from 1 to 4"),
        ({"ple_layer_ids": [5]}, "ple_layer_ids must be numbers of layers, from 1 to 4"),
        ({"ple_layer_ids": [4]}, "ple_layer_ids must be numbers of layers of linear_attention"),
        ({"ple_embed_dim": 30}, "ple_embed_dim must be a multiple of the 4 n-gram heads"),
        ({"ngram_size": 1}, "ngram_size must be an integer from 2"),
        ({"eos_token_id": None}, "config.json has no eos_token_id"),
        ({"eos_token_id": []}, "eos_token_id must be a token's id"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(exp: Reference, change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        Qwen4Exp().configure(exp.config | change)


def test_published_names_of_layers_are_read(exp: Reference) -> None:
    kinds = [kind.replace("indexed", "full") for kind in exp.config["layer_types"]]
    assert kinds != exp.config["layer_types"]
    read = Qwen4Exp().configure
    assert read(exp.config | {"layer_types": kinds}) == read(exp.config) == read(exp.config | {"layer_types": None})


def test_without_n_grams_nothing_is_kept_of_them(exp: Reference) -> None:
    read = Qwen4Exp().configure
    with_them, without = read(exp.config).state, read(exp.config | {"ple_layer_ids": []}).state
    assert with_them.tensors[:2] == without.tensors
    assert [tensor.shape for tensor in with_them.tensors[2:]] == [(3 * 64, 9), (2,)]


def test_more_layers_than_config_json_says_are_not_dropped(exp: Reference) -> None:
    norm = "attn_hyper_connection.hc_norm.weight"
    more = TensorWeights({**exp.weights.tensors, f"model.layers.4.{norm}": exp.weights.get(f"model.layers.3.{norm}")})
    with pytest.raises(CheckpointError, match=r"num_hidden_layers is 4, but there is a tensor model\.layers\.4\."):
        Stepper(replace(exp, weights=more))
