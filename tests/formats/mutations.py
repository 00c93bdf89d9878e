"""Broken checkpoints: each is refused in one sentence, or served without an exception.

PYTHONPATH=tests python tests/formats/mutations.py 2000 [CASE ...]   # `just fuzz`
"""

from __future__ import annotations

import copy
import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzzing
import torch
from format_cases import CASES, PLUGINS, PROMPT, RENAMED, QuantizedTorch, stored
from safetensors.torch import save_file

from blade import SamplingParams, Sequence, Step
from blade.checkpoint.open import open_checkpoint
from blade.engine.batch import build_batch
from blade.nn import Loader
from blade.nn.tensors import loaded_bytes, num_params
from blade.quantization import choose_form
from blade.types import KVSpec
from blade_native.attention import PagedAttention

JUNK: list[Any] = [
    None, True, False, 0, -1, 1, 3, 5, 7, 16, 33, 2**40, -(2**70), 0.5, 1e308, "", "x", "re:(", "re:.*", "Linear",
    "int", "float", "channel", "tensor", "group", "block", "tensor_group", "float-quantized", "int-quantized", [], [0],
    [1, 1], [3, 5], ["x"], {}, {"x": 1}, {"x": {}}, {"": None},
]  # fmt: skip
DTYPES = [torch.uint8, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2, torch.int16, torch.float16, torch.bfloat16,
          torch.int32, torch.float32, torch.int64, torch.bool]  # fmt: skip
Tensors = dict[str, torch.Tensor]
NUM_MUTATIONS = (1, 1, 1, 2, 3)  # of one checkpoint


class Checkpoint:
    """A fixture in memory."""

    def __init__(self, case: str) -> None:
        self.config, self.tensors = stored(case)

    def write(self, folder: Path, rng: random.Random) -> None:
        """Changed in some places."""
        config, tensors = copy.deepcopy(self.config), dict(self.tensors)
        kinds = [
            rng.choice(["config", "config", "tensor", "tensor", "tensor", "file"])
            for _ in range(rng.choice(NUM_MUTATIONS))
        ]
        for kind in kinds:
            if kind == "config":
                change_value(config.get("quantization") or config["quantization_config"], rng)
            elif kind == "tensor":
                change_tensor(tensors, rng)
        (folder / "config.json").write_text(json.dumps(config))
        path = folder / "model.safetensors"
        save_file(tensors, path)
        if "file" in kinds:
            change_bytes(path, rng)


def change_value(values: dict[str, Any], rng: random.Random) -> None:
    """Of some key, at any depth: junk, or gone."""
    key = rng.choice([*values, "extra"])
    if isinstance(values.get(key), dict) and values[key] and rng.random() < 0.8:
        change_value(values[key], rng)
    elif rng.random() < 0.2:
        values.pop(key, None)
    else:
        values[key] = copy.deepcopy(rng.choice(JUNK))


def change_tensor(tensors: Tensors, rng: random.Random) -> None:
    name = rng.choice([name for name in tensors if "layers" in name] or list(tensors))
    tensor = tensors[name].clone()
    changes: list[Callable[[], torch.Tensor | None]] = [
        lambda: None,
        lambda: tensor.flatten(),
        lambda: tensor[None],
        lambda: tensor.flatten()[: rng.randint(0, tensor.numel())],
        lambda: tensor.reshape(-1, 1),
        lambda: tensor.T if tensor.dim() == 2 else tensor.view(-1)[:0],
        lambda: tensor.new_zeros(()),
        lambda: torch.cat([tensor, tensor]) if tensor.dim() else tensor,
        lambda: tensor.flatten().view(torch.uint8).random_().view(tensor.dtype).view(tensor.shape),
        lambda: tensor.flatten().view(torch.uint8).clone().fill_(rng.choice([0, 127, 128, 255])).view(tensor.dtype),
        lambda: tensor.float().to(rng.choice(DTYPES)),
        lambda: tensor.view(rng.choice([dtype for dtype in DTYPES if dtype.itemsize == tensor.dtype.itemsize])),
    ]
    changed = rng.choice(changes)()
    if changed is None:
        del tensors[name]
    else:
        tensors[name] = changed.clone().contiguous()
    if rng.random() < 0.1:
        tensors[name.rpartition(".")[0] + rng.choice([".g_idx", ".weight_g_idx", ".weight_zero_point"])] = (
            tensor.clone()
        )


def change_bytes(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    if rng.random() < 0.3:
        del data[rng.randrange(len(data)) :]
    header = int.from_bytes(data[:8], "little") if len(data) >= 8 else 0
    for _ in range(rng.randint(1, 4)):
        if data:
            place = rng.randrange(min(len(data), 8 + header) if rng.random() < 0.7 else len(data))
            data[place] = rng.choice([rng.randrange(256), *b'0123456789"[]{},:F'])
    path.write_bytes(data)


def serve(folder: Path) -> None:
    """All that a start does with the weights, and a step. Raises what that raises."""
    checkpoint, ops = open_checkpoint(folder), QuantizedTorch()
    architecture = PLUGINS.registry("register_models").create("LlamaForCausalLM")
    config = architecture.configure(checkpoint.config)
    form = choose_form(checkpoint, None, ops, torch.float32, PLUGINS)
    weights = checkpoint.weights
    for name in weights.names():
        loaded_bytes(name, weights, ops, torch.float32, form.quantization)
    num_params(weights, form.quantization)
    attention = PagedAttention(ops.device)
    model = architecture.build(config, Loader(weights, ops, attention, torch.float32, form.quantization))
    seq = Sequence(0, PROMPT, SamplingParams(max_tokens=1), blocks=[0])
    batch = build_batch(Step([seq], [len(PROMPT)]), 16, ops.to_device)
    heads = config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim
    model.forward(batch, attention.allocate(KVSpec(*heads, dtype="float32"), 1))


def fuzz(case: str, num: int, seed: int = 0) -> Counter[str]:
    """fuzzing.fuzz of a fixture."""
    return fuzzing.fuzz(case, num, seed, Checkpoint(case).write, serve)


if __name__ == "__main__":
    fuzzing.main([*CASES, *RENAMED], fuzz)
