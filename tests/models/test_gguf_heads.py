"""Heads that predict further tokens, out of GGUF files (make_gguf_fixtures.py), as a drafter."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from gguf_mutations import Content, content_of, written
from test_hybrid_engine import generate

from blade import CheckpointError, Config, ConfigError, DraftOptions, EngineConfig, ModelOptions
from blade.assembly import Assembly, choose, load_draft, load_model
from blade.plugins import load

if TYPE_CHECKING:
    from pathlib import Path

PROMPTS = [[3, 1, 4, 15, 9, 26, 5, 3, 5, 8], [9, 7, 9, 3], [2, 3, 8, 4, 6, 2, 6]]


def with_head(case: str) -> Content:
    """A file with the head of qwen35's. Of mixtures of experts the head's is that of the last layer."""
    content, other = content_of(case), content_of("qwen35")
    if case == "qwen35":
        return content
    content.metadata |= {f"{case}.block_count": 5, f"{case}.nextn_predict_layers": 1}
    content.tensors |= {
        name: tensor for name, tensor in other.tensors.items() if name.startswith("blk.4.") and ".ffn_" not in name
    }
    experts = {name: tensor for name, tensor in content.tensors.items() if name.startswith("blk.3.ffn_")}
    content.tensors |= {name.replace("blk.3", "blk.4"): tensor for name, tensor in experts.items()}
    return content


def parted(content: Content) -> tuple[Content, Content]:
    """A model without its head, and the head in a file of its own, as llama.cpp's converter makes them when asked to:
    with what the model shares with it."""
    head = Content(content.metadata, {k: x for k, x in content.tensors.items() if k[:4] != "blk." or k[:6] == "blk.4."})
    keys = {"qwen35.block_count": 4, "qwen35.nextn_predict_layers": 0}
    bare = {name: x for name, x in content.tensors.items() if not name.startswith("blk.4.")}
    return Content(content.metadata | keys, bare), head


def chosen(content: Content, folder: Path, *drafters: str, head: Content | None = None) -> Assembly:
    path, draft = folder / "model.gguf", folder / "head.gguf"
    path.write_bytes(written(content))
    if head is not None:
        draft.write_bytes(written(head))
    options = ModelOptions(model=str(path), dtype="float32", max_model_len=64)
    engine = EngineConfig(threads=1, drafter=drafters)
    return choose(Config(model=options, draft=DraftOptions(model=head and str(draft)), engine=engine), load())


@pytest.mark.parametrize("case", ["qwen35", "qwen35 apart", "qwen35moe", "qwen3next"])
def test_they_draft_and_change_no_token(case: str, tmp_path: Path) -> None:
    content, head = with_head(case.removesuffix(" apart")), None
    if case.endswith("apart"):
        content, head = parted(content)
    plain = chosen(content, tmp_path)
    said, _ = generate((plain, load_model(plain)), PROMPTS, 1)
    assembly = chosen(content, tmp_path, "mtp", head=head)
    model = load_model(assembly)
    drafted, stats = generate(
        (assembly, model), PROMPTS, 1, load_draft(assembly, model), drafter=("mtp",), adaptive_drafts=False
    )
    assert drafted == said
    assert stats.draft_tokens > 0


def test_its_experts_are_those_of_the_file(tmp_path: Path) -> None:
    weights = chosen(with_head("qwen35moe"), tmp_path).checkpoint.weights
    layer = "model.layers.3.mlp."
    names = [name for name in weights.names() if name.startswith(layer)]
    assert len(names) == 3 * 4 + 5
    for name in names:
        assert torch.equal(weights.get(name.replace(layer, "mtp.layers.0.mlp.")), weights.get(name))


def test_a_file_of_heads_alone_drafts_as_heads(tmp_path: Path) -> None:
    content, head = parted(content_of("qwen35"))
    with pytest.raises(ConfigError, match=r"recurrent layers, which cannot take back .* or add --drafter mtp, which"):
        chosen(content, tmp_path, head=head)


@pytest.mark.parametrize("part", ["embed_tokens", "shared_head_head"])
def test_parts_that_no_model_shares_are_refused_by_the_drafter_alone(part: str, tmp_path: Path) -> None:
    content = content_of("qwen35")
    content.tensors[f"blk.4.nextn.{part}.weight"] = content.tensors["token_embd.weight"]
    chosen(content, tmp_path)
    with pytest.raises(CheckpointError, match=rf"has a tensor mtp\.{part}\.weight, which --drafter mtp does not know"):
        chosen(content, tmp_path, "mtp")
