"""JSON files beside the weights with every key at values that it must not have, or hardly ever has: each folder is
refused in one sentence, or read without an exception.

PYTHONPATH=tests python tests/formats/file_values.py 1 [CASE ...]   # N: every N-th alone; `just fuzz-values`
"""

from __future__ import annotations

import copy
import json
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fuzzing
from file_mutations import CASES as BROKEN
from file_mutations import FAMILIES as BROKEN_FAMILIES

CASES = {name: case for name, case in BROKEN.items() if case.file.endswith(".json")}
FAMILIES = BROKEN_FAMILIES
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 256, 2**16, 2**31 - 1, 2**31, 2**40, 2**63, 10**400, 0.0, 0.5, 1.5, -1.0,
    1e-300, 1e30, 1e308, float("nan"), float("inf"), float("-inf"), "", "0", "x", "bfloat16", "float8", "torch.float32",
    "\ud800", "x" * 5000, [], [0], [-1], [1, 2, 3, 4], [2**40], ["x"], [None], [[]], [{}], ["full_attention"],
    ["full_attention"] * 2000, [0.5] * 8, {}, {"x": 1}, {"": None}, {"content": "x"}, {"content": []}, {"type": "x"},
]  # fmt: skip
LLAMA3 = {"low_freq_factor": 4, "high_freq_factor": 1, "original_max_position_embeddings": 8192}
ROPES: list[Any] = [
    *({"rope_type": kind} for kind in ("linear", "dynamic", "yarn", "llama3", "longrope", "default", "mrope", "x")),
    *({"type": kind, "factor": by} for kind in ("linear", "dynamic", "yarn") for by in (0, -1, 1, 1e30, "2", None)),
    {"rope_type": "yarn", "factor": 2, "beta_fast": 0, "beta_slow": 1}, {"rope_type": "llama3", "factor": 8} | LLAMA3,
    {"rope_type": "longrope", "short_factor": [1.0], "long_factor": []}, {"full_attention": {"rope_type": "default"}},
    {"rope_theta": 0}, {"rope_theta": 1e300}, {"partial_rotary_factor": 1e-9},
]  # fmt: skip
METHODS = [
    "gptq",
    "awq",
    "auto-round",
    "compressed-tensors",
    "fp8",
    "bitsandbytes",
    "modelopt",
    "torchao",
    "hqq",
    "mlx",
    "x",
]
SETTINGS: list[Any] = [
    {}, {"bits": 4, "group_size": 0}, {"bits": 2**40}, {"config_groups": []}, {"quant_type": {"default": 1}}
]  # fmt: skip
QUANTIZATIONS = [{"quant_method": method} | settings for method in METHODS for settings in SETTINGS]
ABSENT = {  # keys that the files lack
    "config.json": (
        "rope_scaling rope_parameters quantization_config quantization layer_types text_config sliding_window dtype "
        "use_sliding_window max_window_layers attention_bias mlp_bias bos_token_id pad_token_id num_experts "
        "dual_chunk_attention_config partial_rotary_factor original_max_position_embeddings"
    ),
    "generation_config.json": "pad_token_id temperature max_length chat_format",
    "tokenizer_config.json": "bos_token unk_token add_bos_token add_eos_token added_tokens_decoder model_max_length",
    "special_tokens_map.json": "unk_token additional_special_tokens",
    "adapter_config.json": (
        "alpha_pattern rank_pattern modules_to_save layer_replication use_rslora bias target_modules "
        "alora_invocation_tokens"
    ),
}
MORE = {  # values for some
    "rope_scaling": ROPES, "rope_parameters": ROPES, "quantization_config": QUANTIZATIONS, "quantization": QUANTIZATIONS
}  # fmt: skip
MOST_INNER = 6  # items of a list, or keys of a vocabulary, that are changed


def changes(file: str, value: Any) -> Iterator[Any]:
    """The file's content, one key changed."""
    for path in paths(value):
        for junk in VALUES:
            yield changed(value, path, junk)
    for key in ABSENT.get(file, "").split():
        for junk in [*VALUES, *MORE.get(key, [])]:
            yield value | {key: junk}


def paths(value: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    for key in keys if isinstance(value, dict) and len(keys) < 100 else list(keys)[:MOST_INNER]:
        yield (*before, key)
        yield from paths(value[key], (*before, key))


def changed(value: Any, path: tuple[Any, ...], junk: Any) -> Any:
    copied = inner = copy.deepcopy(value)
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = junk
    return copied


def sweep(name: str, model: Path, every: int = 1) -> Counter[str]:
    """fuzzing.fuzz of each file, or of every so manieth; `model`: the folder of a tiny Llama."""
    case = (CASES | FAMILIES)[name]
    with tempfile.TemporaryDirectory() as sound:
        case.write(Path(sound), model)
        case.read(Path(sound))
        todo = list(changes(case.file, json.loads((Path(sound) / case.file).read_text())))[:: max(every, 1)]
        given = iter(todo)

        def write(folder: Path, _: random.Random) -> None:
            shutil.rmtree(folder)
            shutil.copytree(sound, folder)
            (folder / case.file).write_text(json.dumps(next(given)))

        return fuzzing.fuzz(name, len(todo), 0, write, case.read)


if __name__ == "__main__":
    from conftest import write_tiny_llama, write_tiny_tokenizer

    with tempfile.TemporaryDirectory() as tiny:
        write_tiny_tokenizer(Path(tiny))
        write_tiny_llama(Path(tiny), layers=1)
        fuzzing.main(CASES | FAMILIES, lambda name, num: sweep(name, Path(tiny), num))
