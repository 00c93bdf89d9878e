"""`blade_llm_quantize`: BladeLLM's spelling of `blade quantize`."""

from __future__ import annotations

import re
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
    assert capsys.readouterr().err.startswith(f"blade_llm_quantize: {out} is there already.")


FP8_OF_4 = "--quant_dtype fp8 has 8 bits. Leave --bit out, or use --quant_dtype int."
ROWS = "--quant_mode act_and_weight_quant has one scale for each row. Use --block_wise_quant false."
SMOOTH = "--quant_algo smoothquant_gptq moves .* Add --quant_mode act_and_weight_quant, or use --quant_algo awq."
TEXTS = (
    "--quant_algo minmax looks .* Leave --calib_data_file, --calib_data, --samples and .* or use another --quant_algo."
)
TYPED = "--algo minmax looks .* Leave --calib_data_file, --calib_data, --samples and .* or use another --algo."


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--quant_dtype fp8 --bit 4", FP8_OF_4),
        ("--quant_mode act_and_weight_quant --block_wise_quant", ROWS),
        ("--quant_algo smoothquant_gptq", SMOOTH),
        ("--calib_data x", TEXTS),
        ("--calib_data x -- --algo minmax", TYPED),
        ("--quant_algo gptq --calib_data_file /none/x", "--calib_data_file /none/x cannot be read: .*"),
        ("--bit 5", "argument --bit: must be one of 8, 4, not '5'."),
    ],
)
def test_what_blade_refuses_is_named_as_it_was_typed(
    words: str, message: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        compat_quantize.main(["--model", str(model), "--output_dir", str(tmp_path / "out"), *words.split()])
    assert re.match(rf"blade_llm_quantize: {message}", capsys.readouterr().err)


def test_a_command_is_added_once_however_often_blade_is_called(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        with pytest.raises(SystemExit, match="0"):
            cli.main(["plugins"])
    assert "quantize" in capsys.readouterr().out
