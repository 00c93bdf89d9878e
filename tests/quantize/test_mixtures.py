"""Families that are not Llama-like: mixtures of experts, experts that no token comes to, rows in another order."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

from blade import ModelConfig
from blade.contracts import OpenedModel
from blade.testing import ByteTokenizer, TensorWeights
from blade_native.reference import TorchOps
from blade_quantize.convert import Converter, all_tensors
from blade_quantize.folder import read_back
from blade_quantize.quality import hidden_states
from blade_quantize.scheme import Scheme

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from blade import Batch, KVCache
    from blade.contracts import Loader, Model

D, I, E, V = 64, 32, 3, 300  # noqa: E741
ORDER = torch.arange(D).flip(0)
IDS = list(range(2, 42))


class Toy:
    """contracts.Architecture and Model: a linear whose rows are turned round, and experts of which the last is idle."""

    def configure(self, config: Mapping[str, Any]) -> ModelConfig:
        return ModelConfig("ToyForCausalLM", V, 512, 1, 1, 1, D)

    def build(self, config: ModelConfig, loader: Loader) -> Model:
        self.config, self.ops = config, loader.ops
        self.embed = loader.embedding("model.embed_tokens")
        self.mix = loader.linear("model.mix", shapes=[(D, D)], order=ORDER)  # type: ignore[call-arg]
        self.router = loader.linear("model.mlp.gate", shapes=[(E, D)])
        names = [f"model.mlp.experts.{i}" for i in range(E)]
        gate_up = [loader.linear(f"{name}.gate_proj", f"{name}.up_proj", shapes=[(I, D)] * 2) for name in names]
        down = [loader.linear(f"{name}.down_proj", shapes=[(D, I)]) for name in names]
        self.experts = loader.ops.experts(gate_up, down)
        self.lm_head = loader.linear("lm_head", shapes=[(V, D)])
        return self

    def forward(self, batch: Batch, kv: KVCache) -> Tensor:
        x = self.mix(self.embed(batch.input_ids))
        logits = self.router(x, torch.float32)
        logits[:, E - 1] = -torch.inf
        ids, weights = self.ops.route(logits, 1, True)
        return self.lm_head(x + self.experts(x, ids, weights), torch.float32)


def toy_tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    shapes = {"model.embed_tokens": (V, D), "model.mix": (D, D), "model.mlp.gate": (E, D), "lm_head": (V, D)}
    for i in range(E):
        name = f"model.mlp.experts.{i}"
        shapes |= {f"{name}.gate_proj": (I, D), f"{name}.up_proj": (I, D), f"{name}.down_proj": (D, I)}
    return {f"{name}.weight": torch.randn(shape) * 0.3 for name, shape in shapes.items()}


def opened_toy(tensors: Mapping[str, Tensor], stored: Mapping[str, Tensor] | None = None) -> OpenedModel:
    toy, weights = Toy(), TensorWeights(tensors)
    return OpenedModel(
        name="toy",
        path=Path("toy"),
        config={},
        architecture=toy,
        model_config=toy.configure({}),
        weights=weights,
        stored=weights if stored is None else TensorWeights(stored),
        ops=TorchOps(),
        dtype=torch.float32,
        tokenizer=ByteTokenizer(),
    )


@pytest.mark.parametrize("algo", ["gptq", "minmax"])
def test_experts_are_rounded_with_the_tokens_that_come_to_them(algo: Any, tmp_path: Path) -> None:
    opened, scheme = opened_toy(toy_tensors()), Scheme(algo, 8, group=32)
    done: list[int] = []
    converter = Converter(opened, scheme, len(IDS))
    result = converter.write(tmp_path, [IDS] if scheme.calibrated else [], lambda: done.append(1))
    idle = [f"model.mlp.experts.{E - 1}.{name}_proj" for name in ("gate", "up", "down")]
    assert sorted(result.uncalibrated) == (sorted(idle) if algo == "gptq" else [])
    assert len(done) == converter.num_rounded == 1 + 2 * E
    assert result.plain == {"model.mlp.gate": "for it is small and decides much"}
    assert result.ignore == ["model.mlp.gate", "lm_head"]
    assert set(idle) < set(result.quantized)
    assert result.num_bytes == sum(tensor.nbytes for tensor in load_file(tmp_path / "model.safetensors").values())
    before, _ = hidden_states(opened, opened.weights, IDS)
    after, head = hidden_states(opened, read_back(tmp_path, scheme, result.quantized), IDS)
    assert head == "lm_head"
    assert 0 < float((after - before).abs().max()) < 0.02 * float(before.abs().max())


def test_what_the_model_does_not_see_is_copied_unless_it_sees_it_in_parts() -> None:
    seen = toy_tensors()
    stored = {name: tensor for name, tensor in seen.items() if ".experts." not in name}
    stored |= {"model.mlp.experts.gate_up_proj": torch.zeros(1), "model.visual.patch.weight": torch.ones(2, 2)}
    stored |= {"mtp.mlp.experts.gate_up_proj": torch.zeros(1)}
    opened = opened_toy(seen, stored)
    tensors = all_tensors(opened)
    assert tensors.keys() == seen.keys() | {"model.visual.patch.weight", "mtp.mlp.experts.gate_up_proj"}
    assert tensors["model.visual.patch.weight"].get("model.visual.patch.weight").sum() == 4


def test_what_the_model_sees_put_together_is_written_as_a_whole() -> None:
    seen = toy_tensors() | {"model.table.weight": torch.ones(4, 2)}
    shards = {f"model.table.shard_{i}.weight": torch.ones(2, 2) for i in range(2)}
    assert all_tensors(opened_toy(seen, toy_tensors() | shards)).keys() == seen.keys()


def test_rows_come_in_the_order_that_is_asked_for(tmp_path: Path) -> None:
    tensors = toy_tensors()
    tensors |= {f"model.mlp.experts.{i}.down_proj.weight": torch.zeros(D, I) for i in range(E)}
    found, _ = hidden_states(opened_toy(tensors), TensorWeights(tensors), IDS)
    x = tensors["model.embed_tokens.weight"][IDS]
    torch.testing.assert_close(found, (x @ tensors["model.mix.weight"].T)[:, ORDER])
