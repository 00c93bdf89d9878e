"""What ``blade quantize`` writes, what it says, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

from blade import CheckpointError, ConfigError, DualChunks, ModelConfig
from blade.cli import main
from blade_quantize import convert, folder
from blade_quantize.texts import most_tokens

if TYPE_CHECKING:
    from collections.abc import Callable

    Run = Callable[..., tuple[Path, str]]


def test_the_folder_is_a_checkpoint_as_the_hub_has_them(model: Path, run: Run) -> None:
    out, printed = run(model, bits=4, group="64", ignore=("*.1.mlp.down_proj",))
    config = json.loads((out / "config.json").read_text())
    settings = config.pop("quantization_config")
    assert config == json.loads((model / "config.json").read_text())
    assert (settings["quant_method"], settings["format"]) == ("compressed-tensors", "pack-quantized")
    (group,) = settings["config_groups"].values()
    assert group["targets"] == ["Linear"]
    assert {key: group["weights"][key] for key in ("num_bits", "type", "symmetric", "strategy", "group_size")} == {
        "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64,
    }  # fmt: skip
    assert group["input_activations"] is None
    assert settings["ignore"] == ["model.layers.1.mlp.down_proj", "lm_head"]
    assert "model.layers.*.mlp.down_proj stays plain, as --ignore says" in printed
    names = {path.name for path in out.iterdir()}
    assert names == {path.name for path in model.iterdir()} - {"pytorch_model.bin"}
    assert (out / "README.md").read_text() == "about the model"
    assert not list(out.parent.glob(".out*"))


def test_tensors_stand_for_the_matrices_they_replace(model: Path, run: Run) -> None:
    out, _ = run(model, bits=4, group="32", symmetric=False)
    old, new = load_file(model / "model.safetensors"), load_file(out / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    packed, scale, zero = (new[f"{name}.weight_{end}"] for end in ("packed", "scale", "zero_point"))
    n, k = old[f"{name}.weight"].shape
    assert new[f"{name}.weight_shape"].tolist() == [n, k]
    assert scale.dtype == torch.bfloat16
    for row, column in ((0, 0), (3, 17), (n - 1, k - 1)):
        code = (int(packed[row, column // 8]) >> 4 * (column % 8)) & 15
        offset = (int(zero[row // 8, column // 32]) >> 4 * (row % 8)) & 15
        value = float(scale[row, column // 32]) * (code - offset)
        assert abs(value - float(old[f"{name}.weight"][row, column])) <= float(scale[row, column // 32])
    kept = {name for name in old if not name.endswith("_proj.weight")}
    assert {name for name in new if ".weight_" not in name} == kept
    assert all(torch.equal(old[name], new[name]) for name in kept)


@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        ({"mode": "weight-and-activation"}, (torch.int8, "int", "int-quantized")),
        ({"kind": "fp8", "mode": "weight-and-activation"}, (torch.float8_e4m3fn, "float", "float-quantized")),
    ],
)
def test_activations_are_rounded_by_the_server(
    options: dict[str, Any], kinds: tuple[torch.dtype, str, str], model: Path, run: Run
) -> None:
    out, _ = run(model, **options)
    tensors = load_file(out / "model.safetensors")
    weight, scale = (tensors[f"model.layers.0.self_attn.q_proj.weight{end}"] for end in ("", "_scale"))
    settings = json.loads((out / "config.json").read_text())["quantization_config"]
    (group,) = settings["config_groups"].values()
    activations = group["input_activations"]
    assert (weight.dtype, activations["type"], settings["format"]) == kinds
    assert scale.shape == (len(weight), 1)
    assert (activations["strategy"], activations["dynamic"], activations["num_bits"]) == ("token", True, 8)


def test_large_models_are_sharded(model: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = run(model, model.parent / "whole")
    small = convert.ShardWriter
    monkeypatch.setattr(convert, "ShardWriter", lambda folder, plan: small(folder, plan, max_bytes=40_000))
    out, _ = run(model)
    files = sorted(out.glob("*.safetensors"))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert [file.name for file in files] == [
        f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))
    ]
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    wanted = load_file(whole / "model.safetensors")
    assert len(files) > 2
    assert index["weight_map"] == {name: file.name for file in files for name in load_file(file)}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    assert all(torch.equal(found[name].view(torch.uint8), wanted[name].view(torch.uint8)) for name in wanted | found)
    shutil.rmtree(whole)


def test_rows_that_do_not_divide_into_groups(model: Path, run: Run) -> None:
    out, printed = run(model, group="128")
    assert "q_proj stays plain, for rows of 64 numbers do not divide into groups of 128" in printed
    settings = json.loads((out / "config.json").read_text())["quantization_config"]
    assert "model.layers.0.self_attn.q_proj" in settings["ignore"]
    assert "model.layers.0.mlp.down_proj" not in settings["ignore"]


def test_texts_of_blades_own_and_of_the_users(model: Path, run: Run) -> None:
    _, printed = run(model, model.parent / "own", algo="gptq", samples=2, tokens=30)
    assert "calibrated on 60 tokens of blade's own texts, in 2 samples" in printed
    _, printed = run(model, model.parent / "text", algo="gptq", text=("abc", "hello world!" * 4), tokens=32)
    assert "calibrated on 51 tokens of --text, in 3 samples" in printed
    short = model.parent / "short"
    shutil.copytree(model, short)
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 80}))
    evaluate = short / "evaluate.txt"
    evaluate.write_text("A text of its own, not long. " * 2)
    _, printed = run(short, model.parent / "fitted", algo="gptq", samples=2, evaluate=evaluate)
    assert "calibrated on 160 tokens of blade's own texts, in 2 samples" in printed
    for name in ("own", "text", "short", "fitted"):
        shutil.rmtree(model.parent / name)


def bad_lines(line: str) -> Callable[[Path], dict[str, Any]]:
    def write(tmp_path: Path) -> dict[str, Any]:
        path = tmp_path / "bad.jsonl"
        path.write_text(f'{{"text": "good"}}\n{line}\n')
        return {"algo": "gptq", "calibration": path}

    return write


REFUSED: dict[str, tuple[Callable[[Path], dict[str, Any]], str]] = {
    "no JSON": (bad_lines("text"), "line 2 is no JSON object with a text"),
    "no text": (bad_lines('{"content": "x"}'), "line 2 is no JSON object with a text"),
    "half a pair": (bad_lines('{"text": "\\ud800"}'), "line 2 is no JSON object with a text"),
    "no object": (bad_lines('["x"]'), "line 2 is no JSON object with a text"),
    "no file": (lambda path: {"algo": "gptq", "calibration": path / "none"}, "none cannot be read: No such file"),
    "no texts": (lambda path: {"algo": "gptq", "calibration": Path(os.devnull)}, "holds no texts"),
    "an empty text": (lambda path: {"algo": "gptq", "text": ("",)}, "There is no text in --text"),
    "minmax calibrated": (lambda path: {"text": ("x",)}, "--algo minmax looks at no activations"),
    "no samples": (lambda path: {"algo": "awq", "samples": 0}, "--samples must be at least 1, not 0"),
    "too many tokens": (lambda path: {"algo": "awq", "tokens": 4096}, "--tokens 4096 is beyond the model's context"),
    "nothing left": (lambda path: {"ignore": ("*",)}, "Nothing in uneven can be rounded so: .* as --ignore says"),
    "a pattern too many": (lambda path: {"ignore": ("*.qkv",)}, r"--ignore \*.qkv matches no linear"),
    "no text to evaluate": (lambda path: {"evaluate": path / "none"}, "none cannot be read"),
    "too short a text": (lambda path: {"evaluate": Path(os.devnull)}, "too short to measure"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_leaves_nothing(name: str, model: Path, run: Run, tmp_path: Path) -> None:
    options, message = REFUSED[name]
    (tmp_path / "new").mkdir()
    with pytest.raises(ConfigError, match=message):
        run(model, tmp_path / "new" / "out", **options(tmp_path))
    assert not list((tmp_path / "new").iterdir())


def test_models_that_cannot_be_rounded(model: Path, run: Run, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such folder"):
        run(tmp_path / "none")
    once, _ = run(model, tmp_path / "once")
    with pytest.raises(ConfigError, match=r"once is quantised already\. Name the model it was made of"):
        run(once)
    with pytest.raises(ConfigError, match="once is there already"):
        run(model, once)
    with pytest.raises(ConfigError, match="nowhere is no folder"):
        run(model, tmp_path / "nowhere" / "out")
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        run(tmp_path)


def test_gguf_files_are_refused(smollm2_gguf: Path, run: Run) -> None:
    with pytest.raises(ConfigError, match="is one file, not a folder"):
        run(smollm2_gguf)


def test_layers_that_scales_cannot_be_moved_in(model: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blade_quantize.smoothing.KNOWN", {"OtherForCausalLM"})
    with pytest.raises(ConfigError, match="--algo awq does not know how the layers of LlamaForCausalLM are put"):
        run(model, algo="awq", text=("some text",))
    monkeypatch.undo()
    monkeypatch.setattr("blade_quantize.smoothing.PRODUCERS", ())
    with pytest.raises(ConfigError, match=r"does not know what comes before model.layers.0.self_attn.q_proj"):
        run(model, algo="awq", text=("some text",))


def test_a_full_disk(model: Path, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda path: full)
    with pytest.raises(ConfigError, match=r"out would take 0\.00 GB; the disk has 0\.00 GB left"):
        run(model)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_run_that_breaks_off_leaves_nothing(
    error: type[BaseException], model: Path, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(*args: object) -> None:
        assert [path.name[:16] for path in tmp_path.iterdir()] == [".out.unfinished-"]
        raise error

    monkeypatch.setattr(convert, "describe_plain", broken)
    monkeypatch.setattr("blade_quantize.folder.quantization_config", broken)
    with pytest.raises(error):
        run(model)
    assert not list(tmp_path.iterdir())


def test_sigterm_leaves_nothing(model: Path, tmp_path: Path) -> None:
    code = f"""
import os, signal
from blade_quantize import layout, rounder
from blade_quantize.command import quantize
from blade.opening import opener
from pathlib import Path
rounder.stored = lambda *args: os.kill(os.getpid(), signal.SIGTERM)
quantize({str(model)!r}, Path({str(tmp_path / "out")!r}), device="cpu", open_model=opener(()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert not list(tmp_path.iterdir())


def test_from_the_command_line(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["quantize", "--help"])
    assert "--algo" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="0"):
        main(["quantize", str(model), str(tmp_path / "out"), "--type", "fp8", "--device", "cpu"])
    printed = capsys.readouterr().out
    assert "uneven: fp8 weights by row, by minmax\n" in printed
    assert f"serve it: blade serve --model {tmp_path / 'out'}\n" in printed
    with pytest.raises(SystemExit, match="2"):
        main(["quantize", str(model), str(tmp_path / "out")])
    assert "out is there already" in capsys.readouterr().err


def test_samples_end_where_dual_chunks_begin_to_differ() -> None:
    shape = "X", 10, 4096, 1, 1, 1, 16
    assert most_tokens(ModelConfig(*shape)) == 4096
    assert most_tokens(ModelConfig(*shape, dual_chunks=DualChunks(500, 512))) == 513
