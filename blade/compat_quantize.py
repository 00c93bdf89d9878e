"""`blade_llm_quantize`: BladeLLM's command line, translated into that of `blade quantize`, as blade.compat does it for
the server."""

from __future__ import annotations

from blade.compat import Option, accepted, arguments, boolean, by_name, make_parser, mapped, parse, run
from blade.errors import ConfigError

MODES = {"weight_only_quant": "weight-only", "act_and_weight_quant": "weight-and-activation"}
TYPES = {"int": "int", "fp8": "fp8", "fp8_e4m3": "fp8"}
ALGORITHMS = {
    "minmax": "minmax",
    "gptq": "gptq",
    "awq": "awq",
    "smoothquant": "smoothquant",
    "smoothquant_gptq": "smoothquant+gptq",
}
BITS = {"8": "8", "4": "4"}
MODEL, OUTPUT = "model", "output_dir"

OPTIONS: dict[str, tuple[Option, ...]] = {
    "Quantisation": (
        Option(MODEL, to=lambda value: [value], why="the first argument"),
        Option(OUTPUT, to=lambda value: [value], why="the second argument"),
        mapped("bit", "bits", words=BITS),
        mapped("quant_mode", "mode", why=f"--mode, of {', '.join(MODES)}", words=MODES),
        mapped("quant_dtype", "type", why=f"--type, of {', '.join(TYPES)}", words=TYPES),
        mapped("quant_algo", "algo", why=f"--algo, of {', '.join(ALGORITHMS)}", words=ALGORITHMS),
        Option(
            "block_wise_quant",
            boolean,
            lambda on: ["--group", "64" if on else "channel"],
            why="--group 64, else --group channel",
            default=False,
            spelt={"--group 64": "--block_wise_quant true", "--group channel": "--block_wise_quant false"},
        ),
        Option(
            "calib_data",
            to=lambda texts: [word for text in texts for word in ("--text", text)],
            why="--text, once for each; without any, blade's own texts are taken",
            many=True,
            spelt={"--text": "--calib_data"},
        ),
        mapped("calib_data_file", "calibration"),
        accepted("cpu_offload", "one stack of weights is on the device at a time", type=boolean),
    ),
}
BY_NAME = by_name(OPTIONS)


def translate(argv: list[str]) -> list[str]:
    """BladeLLM's arguments -> those of the `blade` command. Raises ConfigError as blade.compat.translate."""
    given, rest = parse(argv, make_parser("blade_llm_quantize", "blade quantize", OPTIONS), BY_NAME)
    for name, what in ((MODEL, "a model folder or a hub id"), (OUTPUT, "the folder to write")):
        if name not in given:
            raise ConfigError(f"--{name} is missing.", f"Name {what}.")
    args = ["quantize", given.pop(MODEL), given.pop(OUTPUT)]
    for name, value in given.items():
        args += arguments(BY_NAME[name], value)
    return args + rest


def main(argv: list[str] | None = None) -> None:
    """Entry point. Exit status as of `blade`: 2 with one sentence for what the user can mend."""
    run("blade_llm_quantize", translate, argv, BY_NAME)
