"""Heads are chosen with one sentence and a remedy for whatever does not fit."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from head_references import DRAFT_VOCAB, VOCAB, WIDTH, eagle_config, eagle_tensors, tensors_of, write_head
from safetensors.torch import save_file

from blade import BladeError, Config, DraftOptions, EngineConfig, ModelOptions
from blade.assembly import Assembly, choose, load_draft, load_model
from blade.banner import describe
from blade.cli import main
from blade.engine.memory import size
from blade.plugins import load

if TYPE_CHECKING:
    from pathlib import Path


def chosen(model: Path, head: Path | None = None, *drafters: str, dtype: Any = "auto") -> Assembly:
    options = ModelOptions(model=str(model), dtype="float32", max_model_len=256)
    draft = DraftOptions(model=head and str(head), dtype=dtype)
    engine = EngineConfig(threads=1, drafter=drafters, kv_cache_memory=4 << 20)
    return choose(Config(model=options, draft=draft, engine=engine), load())


@pytest.fixture
def head(tmp_path: Path) -> Path:
    return write_head(tmp_path / "head", eagle_config(), eagle_tensors())


def test_a_head_chooses_its_drafter(tiny_llama: Path, head: Path) -> None:
    assembly = chosen(tiny_llama, head)
    assert assembly.drafters == ("eagle3",)
    lines = "\n".join(describe(assembly, assembly.plan_memory()))
    assert "drafts  by 'eagle3'" in lines
    assert "draft model head: 0 M parameters, float32" in lines
    assert chosen(tiny_llama, head, "suffix", "eagle3").drafters == ("suffix", "eagle3")


def test_eagles_own_checkpoints_are_read_where_the_drafter_is_named(tiny_llama: Path, tmp_path: Path) -> None:
    config = eagle_config(architectures=["LlamaForCausalLM"])
    head = write_head(tmp_path / "own", config, eagle_tensors())
    assembly = chosen(tiny_llama, head, "eagle3")
    assert load_draft(assembly, load_model(assembly)) is not None


def test_where_the_states_come_from(tiny_llama: Path, tmp_path: Path) -> None:
    for given, states in (
        ({"eagle_aux_hidden_state_layer_ids": [2, 0, 1]}, (0, 1, 2)),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 0, 1]}}, (1, 1, 2)),  # SGLang's way of counting
    ):
        config = eagle_config(eagle_aux_hidden_state_layer_ids=None) | given
        assembly = chosen(tiny_llama, write_head(tmp_path / "h", config, eagle_tensors()))
        assert assembly.draft is not None
        assert assembly.draft.model_config.hidden_states == states  # type: ignore[attr-defined]


def test_the_published_default_needs_enough_layers(tiny_llama: Path, tmp_path: Path) -> None:
    head = write_head(tmp_path / "h", eagle_config(eagle_aux_hidden_state_layer_ids=None), eagle_tensors())
    with pytest.raises(BladeError, match="states after -1, 1, 2 layers, and LlamaForCausalLM has 2"):
        chosen(tiny_llama, head)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "vocabulary": ({"vocab_size": 1000}, "vocab_size must be 272, as that of the model"),
    "hidden size": ({"target_hidden_size": 96}, "hidden states of 96 numbers, and those of LlamaForCausalLM have 64"),
    "layers": ({"num_hidden_layers": 2}, "num_hidden_layers must be 1"),
    "draft vocabulary": ({"draft_vocab_size": 300}, "draft_vocab_size must be at most the vocabulary's 272"),
    "states": ({"eagle_aux_hidden_state_layer_ids": [1, 2, 9]}, "states after 1, 2, 9 layers"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act must be silu"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_head_for_another_model(tiny_llama: Path, tmp_path: Path, what: str) -> None:
    changes, message = WRONG[what]
    head = write_head(tmp_path / "h", eagle_config(**changes), eagle_tensors())
    with pytest.raises(BladeError, match=message):
        chosen(tiny_llama, head)


def broken(**tensors: torch.Tensor | None) -> dict[str, torch.Tensor]:
    changed = eagle_tensors() | {name.replace("__", "."): x for name, x in tensors.items()}
    return {name: x for name, x in changed.items() if x is not None}


TENSORS = {
    "no d2t": ({"d2t": None}, "knows 200 of 272 tokens, and has no d2t"),
    "an id twice": (
        {"d2t": torch.zeros(DRAFT_VOCAB, dtype=torch.int64).index_fill(0, torch.tensor(3), 1)},
        "one twice",
    ),
    "an id beyond": ({"d2t": torch.full((DRAFT_VOCAB,), 100)}, "a token that the model does not have"),
    "no output matrix": ({"lm_head__weight": None}, "has no lm_head.weight"),
    "another fc": ({"fc__weight": torch.zeros(WIDTH, 2 * WIDTH)}, r"fc.weight has shape \(64, 128\)"),
    "a stranger": ({"midlayer__self_attn__q_norm__weight": torch.zeros(16)}, "q_norm.weight, which is no part of an"),
}


@pytest.mark.parametrize("what", TENSORS)
def test_tensors_that_make_no_head(tiny_llama: Path, tmp_path: Path, what: str) -> None:
    changes, message = TENSORS[what]
    head = write_head(tmp_path / "h", eagle_config(), broken(**changes))

    def load_it() -> None:
        assembly = chosen(tiny_llama, head)
        load_draft(assembly, load_model(assembly))

    with pytest.raises(BladeError, match=message):
        load_it()


def test_the_models_output_matrix_is_used_where_the_head_has_none(tiny_llama: Path, tmp_path: Path) -> None:
    head = write_head(tmp_path / "h", eagle_config(draft_vocab_size=VOCAB), broken(lm_head__weight=None, d2t=None))
    assembly = chosen(tiny_llama, head)
    model: Any = load_model(assembly)
    draft: Any = load_draft(assembly, model)
    assert draft.lm_head is model.lm_head
    assert draft.target_ids is None


def test_what_goes_with_what(tiny_llama: Path, tiny_draft: Path, head: Path) -> None:
    for args, message in (
        ((head,), "is a head that drafts for another model, and none by itself.*--draft.model"),
        ((tiny_llama, None, "eagle3"), "--drafter eagle3 has no model to draft with"),
        ((tiny_llama, None, "mtp"), "no multi-token prediction heads, no tensors mtp"),
        ((tiny_llama, head, "model"), "is for --drafter eagle3, not for --drafter model"),
        (
            (tiny_llama, tiny_draft, "mtp"),
            "no multi-token prediction heads.* Name one of this model that has them with",
        ),
        ((tiny_llama, head, "mtp", "eagle3"), "--drafter mtp and --drafter eagle3 would both draft with --draft"),
    ):
        with pytest.raises(BladeError, match=message):
            chosen(*args)  # type: ignore[arg-type]
    with pytest.raises(BladeError, match="runs in the dtype of the model"):
        chosen(tiny_llama, head, dtype="bfloat16")


def with_heads(folder: Path, to: Path) -> Path:
    """The tiny Llama and a head of its own; what is in it is of no meaning here."""
    shutil.copytree(folder, to)
    last = "model.layers.1."
    tensors = tensors_of(folder)
    own = {name.replace(last, "mtp.layers.0."): x.clone() for name, x in tensors.items() if name.startswith(last)}
    own |= {f"mtp.{name}.weight": torch.ones(WIDTH) for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")}
    save_file(tensors | own | {"mtp.fc.weight": torch.zeros(WIDTH, 2 * WIDTH)}, to / "model.safetensors")
    return to


def test_inspect_tells_of_heads(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = with_heads(tiny_llama, tmp_path / "own")
    num_own = sum(x.numel() for name, x in tensors_of(folder).items() if name.startswith("mtp."))
    for model, heads, num_bytes in ((tiny_llama, None, 0), (folder, "mtp", 4 * num_own)):
        with pytest.raises(SystemExit, match="0"):
            main(["inspect", str(model), "--dtype", "float32", "--json"])
        served = json.loads(capsys.readouterr().out)["served"]
        assert served["heads"] == heads
        assert served["head_bytes"] == num_bytes
    with pytest.raises(SystemExit, match="0"):
        main(["inspect", str(folder), "--dtype", "float32"])
    assert f"heads    of its own to draft with, {size(4 * num_own)}, for --drafter mtp\n" in capsys.readouterr().out


def test_heads_may_lie_in_another_form_of_the_model(tiny_llama: Path, tmp_path: Path) -> None:
    folder = with_heads(tiny_llama, tmp_path / "own")
    own, other = chosen(folder, None, "mtp").draft, chosen(tiny_llama, folder, "mtp").draft
    assert own is not None
    assert other is not None
    assert other.weight_bytes == own.weight_bytes > 0
    assert other.checkpoint.path == folder
    with pytest.raises(BladeError, match="runs in the dtype of the model"):
        chosen(tiny_llama, folder, "mtp", dtype="bfloat16")


def test_heads_of_several_layers_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    folder = with_heads(tiny_llama, tmp_path / "own")
    config = json.loads((folder / "config.json").read_text()) | {"mtp_num_hidden_layers": 2}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BladeError, match="mtp_num_hidden_layers must be 1"):
        chosen(folder, None, "mtp")
