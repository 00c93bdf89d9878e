"""Broken files, many of them: each is refused in one sentence, or read without an exception."""

from __future__ import annotations

import logging
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from blade import BladeError

LONGEST = 900  # characters of a sentence
SECONDS = 5.0  # of computing, for a file that is small


def check_sentence(text: str) -> None:
    assert text.endswith("."), text
    assert "\n" not in text, text
    assert len(text) < LONGEST, text


def fuzz(
    case: str, num: int, seed: int, write: Callable[[Path, random.Random], None], read: Callable[[Path], None]
) -> Counter[str]:
    """How many of `num` broken ones were read, and how many refused. `write` makes one in the folder, over the one
    before. Raises what is no BladeError, and AssertionError for one that is no sentence; the folder then stays."""
    outcomes: Counter[str] = Counter()
    folder = Path(tempfile.mkdtemp(prefix="blade-fuzz-"))
    for i in range(num):
        torch.manual_seed(i)
        write(folder, random.Random(f"{case} {seed} {i}"))
        begun = time.process_time()
        try:
            with torch.inference_mode():
                read(folder)
        except BladeError as error:
            check_sentence(str(error))
            outcomes["refused"] += 1
        except BaseException as error:  # a panic of a library is no Exception
            error.add_note(f"{case}, mutation {i} of seed {seed}, in {folder}")
            raise
        else:
            outcomes["read"] += 1
        if (seconds := time.process_time() - begun) > SECONDS:
            raise AssertionError(f"{case}, mutation {i} of seed {seed}, in {folder}, takes {seconds:.1f} s")
    shutil.rmtree(folder)
    return outcomes


def main(cases: Iterable[str], run: Callable[[str, int], Counter[str]]) -> None:
    """`python SCRIPT NUM [CASE ...]`."""
    logging.disable()
    torch.set_num_threads(1)
    for case in sys.argv[2:] or cases:
        print(case, dict(run(case, int(sys.argv[1]))), flush=True)
