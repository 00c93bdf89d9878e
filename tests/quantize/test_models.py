"""``blade quantize`` from one folder to the other, and the result as blade serves it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

from blade import Config, ModelOptions, SamplingParams, Sequence, Step
from blade.assembly import choose, load_model
from blade.engine.batch import build_batch
from blade.opening import opener
from blade.plugins import load
from blade_quantize.folder import read_back
from blade_quantize.quality import hidden_states, log_probs
from blade_quantize.scheme import Scheme, numbers_per_scale

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

IDS = [(7 * i) % 250 for i in range(40)]
WEIGHTS, BOTH = ("minmax", "gptq", "awq"), ("minmax", "gptq", "smoothquant", "smoothquant+gptq")
FORMS: dict[str, tuple[dict[str, Any], tuple[str, ...], float]] = {  # options, --algo, allowed divergence in nats
    "int8": ({}, WEIGHTS, 5e-3),
    "int8 groups": ({"group": "32"}, WEIGHTS, 5e-3),
    "int8 zeros": ({"group": "64", "symmetric": False}, WEIGHTS, 5e-3),
    "int4": ({"bits": 4, "group": "32"}, WEIGHTS, 0.1),
    "int4 rows": ({"bits": 4, "group": "channel"}, WEIGHTS, 0.1),
    "int4 zeros": ({"bits": 4, "group": "32", "symmetric": False}, WEIGHTS, 0.1),
    "fp8": ({"kind": "fp8"}, ("minmax", "gptq"), 0.02),
    "fp8 both": ({"kind": "fp8", "mode": "weight-and-activation"}, BOTH, 0.03),
    "w8a8": ({"mode": "weight-and-activation"}, BOTH, 5e-3),
}
SCHEMES = {
    f"{form} {algo}": (options | {"algo": algo}, allowed)
    for form, (options, algos, allowed) in FORMS.items()
    for algo in algos
}


def converted(name: str, model: Path, run: Callable[..., tuple[Path, str]], texts: Path) -> tuple[Path, str]:
    options = SCHEMES[name][0]
    calibrated = {} if options["algo"] == "minmax" else {"calibration": texts, "samples": 8}
    return run(model, **options, **calibrated)


def divergence(printed: str) -> float:
    match = re.search(r"divergence ([\d.]+) nats", printed)
    assert match, printed
    return float(match[1])


@torch.inference_mode()
def served(folder: Path, dtype: str, quantize: str | None) -> Tensor:
    """Log of the probabilities after each of IDS, [T, V], as blade serves the folder."""
    options = ModelOptions(model=str(folder), dtype=dtype, quantize=quantize)  # type: ignore[arg-type]
    assembly = choose(Config(model=options), load())
    seq = Sequence(0, IDS, SamplingParams(max_tokens=1))
    seq.blocks = list(range(-(-len(IDS) // assembly.config.engine.block_size)))
    kv = assembly.attention.allocate(assembly.kv_spec, len(seq.blocks))
    batch = build_batch(Step([seq], [len(IDS)]), assembly.config.engine.block_size, assembly.ops.to_device)
    batch.logits_rows = torch.arange(len(IDS))
    return torch.log_softmax(load_model(assembly).forward(batch, kv).float(), -1)


@torch.inference_mode()
def as_read_back(model: Path, out: Path, options: dict[str, Any]) -> Tensor:
    """The same by the command's own reading, with activations as they are."""
    opened = opener(())(str(model), dtype="float32", device="cpu")
    names = ("algo", "bits", "kind", "mode", "symmetric")
    group = numbers_per_scale(options.get("group"), options.get("bits", 8), options.get("kind", "int"), "weight-only")
    scheme = Scheme(**{name: options[name] for name in names if name in options}, group=group)
    config = json.loads((out / "config.json").read_text())
    tensors = load_file(out / "model.safetensors")
    quantized = [name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")]
    assert config["quantization_config"]["format"] == scheme.format
    weights = read_back(out, scheme, quantized)
    return log_probs(weights, *reversed(hidden_states(opened, weights, IDS)))


@pytest.mark.parametrize("name", SCHEMES)
def test_a_model_comes_out_close_and_is_served_as_it_was_measured(
    name: str, model: Path, run: Callable[..., tuple[Path, str]], texts: Path
) -> None:
    options, allowed = SCHEMES[name]
    out, printed = converted(name, model, run, texts)
    assert divergence(printed) <= allowed
    torch.testing.assert_close(served(out, "float32", "none"), as_read_back(model, out, options), rtol=0, atol=2e-3)
    exact, found = served(model, "float32", None), served(out, "auto", None)  # by the kernels
    assert float((exact.exp() * (exact - found)).sum(-1).mean()) <= allowed


@pytest.mark.parametrize(
    "options",
    [{}, {"mode": "weight-and-activation", "algo": "smoothquant"}, {"bits": 4, "group": "channel"}, {"kind": "fp8"}],
)
def test_rows_that_no_groups_of_the_kernels_divide(
    options: dict[str, Any], odd: Path, run: Callable[..., tuple[Path, str]]
) -> None:
    """Kernels have an integer's scale for each 16 numbers at least; fp8 has one for any row."""
    out, printed = run(odd, **options)
    plain = "model.layers.*.mlp.down_proj stays plain, for rows of 72 numbers do not divide into groups of 16"
    assert (plain in printed) is ("kind" not in options)
    exact, found = as_read_back(odd, out, options), served(out, "float32", "none")
    torch.testing.assert_close(found, exact, rtol=0, atol=2e-3)
    found = served(out, "auto", None)
    assert float((exact.exp() * (exact - found)).sum(-1).mean()) <= 0.02


def test_calibration_pays(model: Path, run: Callable[..., tuple[Path, str]], texts: Path, tmp_path: Path) -> None:
    """On the text that the model was calibrated on, whose activations are the model's own."""
    lines = [json.loads(line)["text"] for line in texts.read_text().splitlines()]
    (tmp_path / "same.txt").write_text(" ".join(lines))
    four = {"bits": 4, "group": "64", "evaluate": tmp_path / "same.txt"}
    plain = divergence(run(model, tmp_path / "plain", **four)[1])
    assert divergence(run(model, tmp_path / "gptq", algo="gptq", calibration=texts, **four)[1]) < 0.7 * plain
    assert divergence(run(model, tmp_path / "awq", algo="awq", calibration=texts, **four)[1]) < plain
