"""What ``blade quantize`` does, from the model's folder to the new one."""

from __future__ import annotations

import resource
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from blade import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from blade.contracts import OpenedModel
    from blade_quantize.convert import Conversion
    from blade_quantize.scheme import Scheme
    from blade_quantize.texts import Samples

NUM_SAMPLES, NUM_TOKENS = 32, 512


@dataclass(frozen=True, slots=True)
class Calibration:
    """What the command was told of the texts."""

    path: Path | None = None
    text: tuple[str, ...] = ()
    num_samples: int | None = None
    num_tokens: int | None = None  # of a sample

    def check(self, scheme: Scheme) -> None:
        """Raises ConfigError for numbers that make no sense, and for texts that no one would look at."""
        for option, value in (("--samples", self.num_samples), ("--tokens", self.num_tokens)):
            if value is not None and value < 1:
                raise ConfigError(f"{option} must be at least 1, not {value}.")
        given = self.path or self.text or self.num_samples or self.num_tokens
        if given and not scheme.calibrated:
            raise ConfigError(
                f"--algo {scheme.algo} looks at no activations, so it cannot be calibrated.",
                "Leave --calibration, --text, --samples and --tokens out, or use another --algo.",
            )


def main(
    model: str,
    out: Path,
    scheme: Scheme,
    calibration: Calibration,
    evaluate: Path | None,
    open_model: Callable[[], OpenedModel],
) -> None:
    """Raises ConfigError and CheckpointError, each with a remedy; no folder is left then."""
    started = time.perf_counter()
    calibration.check(scheme)
    check_out(out)
    opened = open_model()
    check_source(opened)

    from blade_quantize import quality
    from blade_quantize.convert import Converter, describe_plain
    from blade_quantize.folder import finish_folder, read_back, unfinished
    from blade_quantize.texts import held_out_ids

    ids = held_out_ids(opened, evaluate)
    samples = _samples(opened, scheme, calibration)
    longest = max(map(len, samples.ids)) if samples else 1
    converter = Converter(opened, scheme, longest)
    print(f"{opened.name}: {scheme}", flush=True)
    if samples:
        print(f"calibrated on {samples}", flush=True)
    with ends_on_sigterm(), unfinished(out, converter.num_bytes) as folder:
        with _progress("measuring", converter.num_stacks) as advance:
            before, head = quality.hidden_states(opened, opened.weights, ids, told=advance)
        with _progress("rounding", converter.num_rounded) as advance:
            result = converter.write(folder, samples.ids if samples else [], advance)
        written, rounded = read_back(folder, scheme, result.quantized), set(result.quantized)
        with _progress("measuring the result", converter.num_stacks) as advance:
            after, _ = quality.hidden_states(opened, written, ids, converter.activations, rounded, advance)
        found = quality.compare(opened.weights, head, before, after, ids)
        finish_folder(folder, opened, scheme, result.ignore)
    for line in (describe_plain(result), _uncalibrated(result)):
        if line:
            print(line)
    print(f"{found}{'' if evaluate else ', of a text of its own'}")
    print(f"weights {_size(_stored(opened))} -> {_size(result.num_bytes)}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"took {time.perf_counter() - started:.1f} s and at most {_size(peak)} of memory")
    print(f"serve it: blade serve --model {out}")


def check_out(out: Path) -> None:
    """Raises ConfigError where nothing can be written."""
    if out.exists() or out.is_symlink():
        raise ConfigError(f"{out} is there already.", "Name a folder that is not.")
    if not out.absolute().parent.is_dir():
        raise ConfigError(f"{out.absolute().parent} is no folder, so nothing can be written there.")


def check_source(opened: OpenedModel) -> None:
    """Raises ConfigError for what is no model of floats in a folder."""
    if opened.path.is_file():
        raise ConfigError(
            f"{opened.path.name} is one file, not a folder as the hub has them.",
            "Name the folder of the model it was made of.",
        )
    if "quantization_config" in opened.config:
        raise ConfigError(f"{opened.name} is quantised already.", "Name the model it was made of.")


def _samples(opened: OpenedModel, scheme: Scheme, calibration: Calibration) -> Samples | None:
    from blade_quantize.texts import most_tokens, read_samples

    if not scheme.calibrated:
        return None
    most = most_tokens(opened.model_config)
    num_tokens = calibration.num_tokens or min(NUM_TOKENS, most)
    if num_tokens > most:
        raise ConfigError(f"--tokens {num_tokens} is beyond the model's context of {most}.")
    num_samples = calibration.num_samples or NUM_SAMPLES
    return read_samples(opened.tokenizer, calibration.path, calibration.text, num_samples, num_tokens)


def _uncalibrated(result: Conversion) -> str:
    if not result.uncalibrated:
        return ""
    return (
        f"{len(result.uncalibrated)} matrices were rounded as by minmax, for no token of the texts came to them: "
        f"{result.uncalibrated[0]}{' and others' if len(result.uncalibrated) > 1 else ''}"
    )


@contextmanager
def _progress(title: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar on a terminal, nothing elsewhere."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(file=sys.stderr), disable=not sys.stderr.isatty(), transient=True) as bars:
        task = bars.add_task(title, total=total)
        yield lambda: bars.advance(task)


@contextmanager
def ends_on_sigterm() -> Iterator[None]:
    """Have SIGTERM end the program as an exception does, so that nothing half done is left."""

    def stop(number: int, frame: Any) -> None:
        sys.exit(128 + number)

    former = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


def _stored(opened: OpenedModel) -> int:
    from math import prod

    weights = opened.stored
    return sum(prod(weights.shape(name)) * weights.get(name).dtype.itemsize for name in weights.names())


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.0f} MB"
