"""Heads change the speed and never the text; one that is always right is taken at its word, one that is always wrong is
not."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from generation import SETTINGS, WAYS, generate, ids
from head_references import VOCAB, WIDTH, eagle_config, eagle_tensors, tensors_of, write_head
from safetensors.torch import save_file

from blade import Config, DraftOptions, EngineConfig, ModelOptions
from blade.assembly import Assembly, choose, load_draft, load_model
from blade.plugins import load

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

HEADS = ["eagle3", "mtp"]
ALL = {"adaptive_drafts": False}


def plain_mtp_tensors() -> dict[str, Tensor]:
    """Random ones of a head of the tiny Llama's own kind."""
    names = {"midlayer.hidden_norm": "pre_fc_norm_hidden", "fc": "fc", "norm": "norm"}
    tensors, wide = eagle_tensors(3, inner=128), {"q", "k", "v"}
    found = {"mtp.pre_fc_norm_embedding.weight": torch.ones(WIDTH)}
    for name, x in tensors.items():
        module, _, kind = name.rpartition(".")
        if module in names:
            found[f"mtp.{names[module]}.{kind}"] = x[:, : 2 * WIDTH] if module == "fc" else x
        elif module.startswith("midlayer."):
            is_wide = module.split(".")[-1].removesuffix("_proj") in wide
            found[f"mtp.layers.0.{module.removeprefix('midlayer.')}.{kind}"] = x[:, :WIDTH] if is_wide else x
    return found


def without_layers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Layers that add nothing: the next token depends on the last one alone."""
    return {name: torch.zeros_like(x) if "o_proj" in name or "down_proj" in name else x for name, x in tensors.items()}


def right_eagle(folder: Path, turn: int = 0) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A head for such a model: it attends to its own place alone, and hands the embedding on. `turn`: how many ids what
    it says is off."""
    target, tensors = tensors_of(folder), eagle_tensors()
    eye = torch.eye(WIDTH)
    tensors |= {f"midlayer.{name}.weight": torch.ones(WIDTH) for name in ("input_layernorm", "hidden_norm")}
    tensors |= {
        "fc.weight": torch.zeros(WIDTH, 3 * WIDTH),
        "midlayer.self_attn.k_proj.weight": torch.zeros(WIDTH, 2 * WIDTH),
        "midlayer.self_attn.v_proj.weight": torch.cat([eye, 0 * eye], dim=1),
        "midlayer.self_attn.o_proj.weight": eye,
        "midlayer.mlp.down_proj.weight": torch.zeros(WIDTH, 96),
        "norm.weight": target["model.norm.weight"],
        "lm_head.weight": target["model.embed_tokens.weight"].roll(turn, dims=0),
        "d2t": torch.zeros(VOCAB, dtype=torch.int64),
    }
    window = {"use_sliding_window": True, "sliding_window": 1, "layer_types": ["sliding_attention"]}
    return eagle_config(draft_vocab_size=VOCAB, num_key_value_heads=4, **window), tensors


def right_mtp(folder: Path, turn: int = 0) -> dict[str, Tensor]:
    target, eye = tensors_of(folder), torch.eye(WIDTH)
    tensors = without_layers(plain_mtp_tensors())
    tensors["mtp.fc.weight"] = torch.cat([eye, 0 * eye], dim=1)
    tensors["mtp.norm.weight"] = target["model.norm.weight"] * (-1 if turn else 1)
    return tensors


def copy_target(folder: Path, to: Path, change: Any = lambda tensors: tensors, **more: Tensor) -> Path:
    shutil.copytree(folder, to)
    tensors = {name: x.contiguous() for name, x in (change(tensors_of(folder)) | more).items()}
    save_file(tensors, to / "model.safetensors", metadata={"format": "pt"})
    return to


@pytest.fixture(scope="module")
def folders(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path | None]]:
    """By name: the model's folder, and its head's where that is in another."""
    root = tmp_path_factory.mktemp("heads")
    made: dict[str, tuple[Path, Path | None]] = {
        "eagle3": (tiny_llama, write_head(root / "e", eagle_config(), eagle_tensors()))
    }
    made["mtp"] = copy_target(tiny_llama, root / "m", **plain_mtp_tensors()), None
    for name, turn in (("right", 0), ("wrong", 1)):
        bare = copy_target(tiny_llama, root / name, without_layers)
        made[f"eagle3 {name}"] = bare, write_head(root / f"e {name}", *right_eagle(bare, turn))
        made[f"mtp {name}"] = copy_target(bare, root / f"m {name}", **right_mtp(bare, turn)), None
    return made


@pytest.fixture(scope="module")
def assemblies(folders: dict[str, tuple[Path, Path | None]]) -> dict[str, Assembly]:
    found = {}
    for name, (folder, head) in folders.items():
        options = ModelOptions(model=str(folder), dtype="float32", max_model_len=256)
        engine = EngineConfig(threads=1, drafter=() if head else ("mtp",))
        config = Config(model=options, draft=DraftOptions(model=head and str(head)), engine=engine)
        found[name] = choose(config, load())
    return found


@pytest.fixture(scope="module")
def plain(assemblies: dict[str, Assembly]) -> Any:
    """What a model says without drafts."""
    known: dict[tuple[str, str], Any] = {}

    def say(name: str, settings: str) -> Any:
        if (name, settings) not in known:
            assembly = replace(assemblies[name], draft=None)
            known[name, settings], _ = generate(assembly, load_model(assembly), None, SETTINGS[settings])
        return known[name, settings]

    return say


def drafted(assembly: Assembly, name: str, params: dict[str, Any], *first: str, **engine: Any) -> Any:
    """With the head, after the drafters `first`. The model is loaded anew: what one shows, it shows for ever."""
    model = load_model(assembly)
    names = (*first, name.split()[0])
    return generate(assembly, model, load_draft(assembly, model), params, drafter=names, **engine)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("how", [{}, ALL], ids=["adaptive", "all verified"])
@pytest.mark.parametrize("name", HEADS)
def test_heads_do_not_change_the_text(assemblies: Any, plain: Any, name: str, settings: str, how: Any) -> None:
    said, stats = drafted(assemblies[name], name, SETTINGS[settings], **how)
    assert ids(said) == ids(plain(name, settings))
    for seq, other in zip(said, plain(name, settings), strict=True):
        for token, same in zip(seq, other, strict=True):
            assert token.logprob == pytest.approx(same.logprob, abs=1e-4)
    assert stats.draft_tokens > 500 or not how


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", HEADS)
def test_nor_does_how_steps_are_made(assemblies: Any, plain: Any, name: str, way: str) -> None:
    said, stats = drafted(assemblies[name], name, SETTINGS["plain"], "suffix", rounds=2, **ALL, **WAYS[way])
    assert ids(said) == ids(plain(name, "plain")) * 2
    assert stats.draft_tokens > 0
    assert stats.drafters[1].tokens_verified > 0
    assert way != "little memory" or stats.preemptions > 0


@pytest.mark.parametrize("name", HEADS)
def test_nor_do_they_over_a_kv_cache_in_int8(assemblies: Any, name: str) -> None:
    bare = replace(assemblies[name], draft=None)
    expected, _ = generate(bare, load_model(bare), None, SETTINGS["plain"], kv_cache_quant="int8")
    said, _ = drafted(assemblies[name], name, SETTINGS["plain"], kv_cache_quant="int8", **ALL)
    assert ids(said) == ids(expected)


@pytest.mark.parametrize("way", ["together", "small steps", "no prefix cache"])
@pytest.mark.parametrize("settings", ["greedy", "hot", "penalties", "biased"])
@pytest.mark.parametrize("name", HEADS)
def test_a_head_that_is_always_right(assemblies: Any, plain: Any, name: str, settings: str, way: str) -> None:
    """At any temperature: it draws with the model's random numbers. Prefixes found in the cache do no harm."""
    said, stats = drafted(assemblies[f"{name} right"], name, SETTINGS[settings], rounds=2, **ALL, **WAYS[way])
    assert ids(said) == ids(plain(f"{name} right", settings)) * 2
    assert stats.draft_tokens > 300
    assert stats.draft_tokens_accepted >= 0.98 * stats.draft_tokens  # its norms round once more than the model's
    assert stats.draft_tokens_accepted == stats.draft_tokens or settings == "penalties"
    (drafter,) = stats.drafters
    assert drafter.tokens_accepted / drafter.drafts_verified > 3
    assert stats.steps < stats.generated_tokens / 2


@pytest.mark.parametrize("name", HEADS)
def test_a_head_that_is_always_wrong(assemblies: Any, plain: Any, name: str) -> None:
    said, stats = drafted(assemblies[f"{name} wrong"], name, SETTINGS["greedy"], **ALL)
    assert ids(said) == ids(plain(f"{name} wrong", "greedy"))
    assert stats.draft_tokens > 500
    assert stats.draft_tokens_accepted == 0
    said, stats = drafted(
        assemblies[f"{name} wrong"], name, SETTINGS["greedy"]
    )  # where it need not pay, it is soon left alone
    assert ids(said) == ids(plain(f"{name} wrong", "greedy"))
    assert stats.draft_tokens < 100


def test_the_head_is_counted(assemblies: Any) -> None:
    eagle = assemblies["eagle3"]
    assert eagle.drafters == ("eagle3",)
    assert eagle.draft.kv_spec.num_layers == 1
    assert eagle.block_bytes == 3 * eagle.draft.block_bytes  # the model has two layers of the same shape
    shapes = {name: x.numel() for name, x in eagle_tensors().items() if name != "t2d"}
    assert eagle.draft.num_params == sum(shapes.values())
    mtp = assemblies["mtp"]
    assert mtp.draft.num_params == sum(x.numel() for x in plain_mtp_tensors().values())
    assert mtp.draft.weight_bytes == 4 * mtp.draft.num_params
