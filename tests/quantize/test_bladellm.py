"""`blade_llm_quantize`: BladeLLM's spelling of `blade quantize`."""

from __future__ import annotations

from pathlib import Path

import pytest

from blade import ConfigError, cli, compat_quantize
from blade.compat_quantize import BY_NAME, translate

BASE = ["quantize", "m", "out"]
DEFAULTS = ["--group", "channel"]
CASES = {
    "bit": ("4", ["--bits", "4"]),
    "quant_mode": ("act_and_weight_quant", ["--mode", "weight-and-activation"]),
    "quant_dtype": ("fp8_e4m3", ["--type", "fp8"]),
    "quant_algo": ("smoothquant_gptq", ["--algo", "smoothquant+gptq"]),
    "block_wise_quant": ("true", ["--group", "64"]),
    "calib_data": ("hello world!", ["--text", "hello world!"]),
    "calib_data_file": ("texts.jsonl", ["--calibration", "texts.jsonl"]),
    "cpu_offload": ("true", []),
}


def test_every_option_has_its_case() -> None:
    assert sorted([*CASES, "model", "output_dir"]) == sorted(BY_NAME)


@pytest.mark.parametrize("name", CASES)
def test_options(name: str) -> None:
    value, wanted = CASES[name]
    rest = [] if name == "block_wise_quant" else DEFAULTS
    for words in ([f"--{name}", value], [f"--{name}={value}"]):
        found = translate(["--model", "m", "--output_dir", "out", *words])
        assert found[:3] == BASE
        assert sorted(found[3:]) == sorted(rest + wanted)


def test_the_sample_of_the_documentation() -> None:
    words = "--model Qwen/Qwen-7B-Chat --output_dir q --quant_algo minmax --quant_mode weight_only_quant --bit 8"
    assert translate(words.split()) == [
        *("quantize", "Qwen/Qwen-7B-Chat", "q", *DEFAULTS),
        *("--algo", "minmax", "--mode", "weight-only", "--bits", "8"),
    ]


def test_several_texts_and_what_follows_a_lone_dash() -> None:
    words = ["--calib_data", "a b", "c", "--model", "m", "--output_dir", "out", "--", "--samples", "3"]
    assert translate(words) == [*BASE, *DEFAULTS, "--text", "a b", "--text", "c", "--samples", "3"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--output_dir", "out"], "--model is missing"),
        (["--model", "m"], "--output_dir is missing"),
        (["--model", "m", "--output_dir", "o", "--quant_algo", "smoothquant+"], r"must be one of .*'smoothquant\+'"),
        (["--model", "m", "--output_dir", "o", "--quant_dtype", "fp8_e5m2"], "must be one of int, fp8, fp8_e4m3"),
        (["--model", "m", "--output_dir", "o", "--quant_bit", "4"], "has no option --quant_bit"),
    ],
)
def test_what_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        translate(words)


def test_from_one_command_line_to_the_other(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    words = ["--model", str(model), "--output_dir", str(out), "--bit", "4", "--block_wise_quant"]
    with pytest.raises(SystemExit, match="0"):
        compat_quantize.main([*words, "--", "--device", "cpu"])
    assert "uneven: int4 weights in groups of 64, by minmax\n" in capsys.readouterr().out
    assert (out / "config.json").exists()
    with pytest.raises(SystemExit, match="2"):
        compat_quantize.main(words)
    assert capsys.readouterr().err.startswith("blade: ")


def test_a_command_is_added_once_however_often_blade_is_called(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        with pytest.raises(SystemExit, match="0"):
            cli.main(["plugins"])
    assert "quantize" in capsys.readouterr().out
