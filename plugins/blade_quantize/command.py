"""The command line of ``blade quantize``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from blade_quantize.scheme import Algo, Group, Kind, Mode, Scheme, numbers_per_scale


def quantize(
    model: str,
    out: Path,
    /,
    *,
    algo: Algo = "minmax",
    bits: Literal[8, 4] = 8,
    kind: Annotated[Kind, Parameter(name="--type")] = "int",
    mode: Mode = "weight-only",
    group: Group | None = None,
    symmetric: bool = True,
    calibration: Path | None = None,
    text: Annotated[tuple[str, ...], Parameter(negative="")] = (),
    samples: int | None = None,
    tokens: int | None = None,
    ignore: Annotated[tuple[str, ...], Parameter(negative="")] = (),
    evaluate: Path | None = None,
    device: str = "auto",
    threads: int | None = None,
    open_model: Annotated[Callable[..., Any], Parameter(parse=False)],
) -> None:
    """Round a model's weights and write a checkpoint (compressed-tensors) that blade serves and transformers loads.

    Parameters
    ----------
    model
        The model of floats: a folder or a hub id (which is fetched).
    out
        The folder to write, which must not exist yet.
    algo
        minmax rounds each number for itself; gptq has later columns make up for it; awq and smoothquant scale channels
        first (smoothquant for --mode weight-and-activation). All but minmax look at activations.
    bits
        Of an integer.
    kind
        int, or fp8 (e4m3), whose steps grow with the numbers.
    mode
        weight-and-activation rounds activations to 8 bits too, each token's by a scale of its own, while it is served.
    group
        How many numbers of a row share a scale; channel: all of them. 128 for 4 bits, channel for 8.
    symmetric
        With --no-symmetric every group has a zero point beside its scale.
    calibration
        A JSON object to a line, {"text": "..."}: texts of the kind that the model is used for.
    text
        A text to calibrate on; repeat for more. Without any, blade's own are taken.
    samples
        Most pieces of text to calibrate on; 32 by default.
    tokens
        Most tokens of a piece; 512 by default, or the model's context where that is less.
    ignore
        Modules that stay plain, as a shell pattern: "*.down_proj". Repeat for more.
    evaluate
        A text file to measure the result on, instead of blade's own.
    device
        Where it is computed: cpu, cuda, or auto.
    threads
        CPU threads; all cores by default.
    """
    from blade_quantize.main import Calibration, main

    scheme = Scheme(algo, bits, kind, mode, numbers_per_scale(group, bits, kind, mode), symmetric, ignore)
    main(
        model,
        out,
        scheme,
        Calibration(calibration, text, samples, tokens),
        evaluate,
        lambda: open_model(model, dtype="float32", device=device, threads=threads),
    )
