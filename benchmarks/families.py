"""Every model family in several weight formats: ``python benchmarks/families.py [--families Llama,Qwen3Moe]``.

Of each family a random checkpoint of 0.2 to 0.4 billion parameters is written, in bfloat16 and in each format, and all
are served by engines without HTTP, in processes that take turns (see formats.py). Measured are output tokens per second
of one and of sixteen sequences while they decode, prompts not included, relative to bfloat16's of the same round, and
what the weights take in memory. Ends in one JSON line. --make and --measure do one half each, so that the halves can be
run at different times.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from families_models import FAMILIES, FORMATS, write_checkpoints
from formats import BATCHES, Contender

AT_LOAD = ("int8", "int4")  # made of bfloat16 by --quantize
KINDS = ("bf16", *AT_LOAD, "gptq", "ct-w8a8", "fp8", "ct-nvfp4", "torchao-int8")
STEPS = {1: 24, 16: 8}  # that are timed, by the number of sequences


def make(families: list[str], kinds: list[str], folder: Path) -> None:
    for family in families:
        written = write_checkpoints(family, [kind for kind in kinds if kind not in AT_LOAD], folder)
        print(family, *written, file=sys.stderr, flush=True)


def measure(family: str, kinds: list[str], folder: Path, rounds: int, threads: int | None) -> list[dict[str, Any]]:
    """A row for each of `kinds`, the first of which the others are compared with."""
    names = {kind: f"{family}-bf16@{kind}" if kind in AT_LOAD else f"{family}-{kind}" for kind in kinds}
    contenders = {kind: Contender(str(folder / name), threads) for kind, name in names.items()}
    rows = {kind: {"family": family, "format": kind} | each.ask("facts") for kind, each in contenders.items()}
    for batch in BATCHES:
        speeds: dict[str, list[float]] = {kind: [] for kind in kinds}
        for turn in range(rounds + 1):  # the first one captures steps
            for kind, contender in contenders.items():
                found = contender.ask("decode", [batch, STEPS[batch] if turn else 2])
                speeds[kind] += [found] if turn else []
        for kind, row in rows.items():
            row[f"batch_{batch}"] = round(statistics.median(speeds[kind]), 1)
            ratios = [mine / first for mine, first in zip(speeds[kind], speeds[kinds[0]], strict=True)]
            row[f"batch_{batch}_ratio"] = round(statistics.median(ratios), 3)
    for contender in contenders.values():
        contender.close()
    return list(rows.values())


def show(row: dict[str, Any]) -> None:
    cells = " ".join(f"{row[f'batch_{batch}']:8.1f} ({row[f'batch_{batch}_ratio']:.2f})" for batch in BATCHES)
    print(f"{row['family']:12} {row['format']:14} {row['weight_bytes'] / 2**20:6.0f} MiB {cells} tokens/s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", default=",".join(FAMILIES), help=f"of {', '.join(FAMILIES)}")
    parser.add_argument(
        "--formats", default=",".join(KINDS), help=f"bf16, int8, int4, {', '.join(FORMATS)}; the first is the measure"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--make", type=Path, metavar="FOLDER", help="write the checkpoints there, and stop")
    parser.add_argument("--measure", type=Path, metavar="FOLDER", help="those that lie there")
    args = parser.parse_args()
    families, kinds = args.families.split(","), args.formats.split(",")
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="blade-families-") as scratch:
        folder = args.make or args.measure or Path(scratch)
        folder.mkdir(exist_ok=True)
        for family in families:
            if not args.measure:
                make([family], kinds, folder)
            if not args.make:
                results += measure(family, kinds, folder, args.rounds, args.threads)
                for row in results[-len(kinds) :]:
                    show(row)
    print(json.dumps({"results": results}))


if __name__ == "__main__":
    main()
