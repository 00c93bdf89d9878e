"""Broken files beside the weights, and broken adapters: each is refused in one sentence, or read without an exception.

PYTHONPATH=tests python tests/formats/file_mutations.py 2000 [CASE ...]   # `just fuzz-files`
"""

from __future__ import annotations

import copy
import json
import random
import shutil
import sys
import tempfile
from base64 import b64encode
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import fuzzing
from format_cases import assembled, logits
from mutations import JUNK, change_bytes
from safetensors.torch import save_file

from blade.assembly import check_shapes, load_model
from blade.checkpoint.open import open_checkpoint
from blade.checkpoint.peft import read_adapter
from blade.checkpoint.safetensors import read_header
from blade.nn.lora import Adapters
from blade.text.chat_template import load_chat_template
from blade.text.tokenizer import load_tokenizer

TESTS = Path(__file__).parents[1]
ADAPTERS = TESTS / "lora" / "fixtures"
MAX_CONTEXT = 4096  # for time's sake
ADAPTED = ("dora-head", "experts")
MESSAGES = [{"role": "user", "content": "Hello! <|im_end|> 123"}]
FURTHER: list[Any] = ["<|im_end|>", "model.norm.weight", [[]], [{}], "\ud800"]  # junk
Write = Callable[[Path, Path], None]
TOKENS = [bytes([i]) for i in range(256)] + [b"he", b"ll", b"hell", b"hello", b" a"]


def start(folder: Path) -> None:
    """All that a start does, and a step."""
    assembly = assembled(folder)
    check_shapes(assembly)
    logits(replace(assembly, max_context=min(assembly.max_context, MAX_CONTEXT)))


def load(folder: Path) -> None:
    """The same, without the step."""
    assembly = assembled(folder)
    check_shapes(assembly)
    load_model(replace(assembly, max_context=min(assembly.max_context, MAX_CONTEXT)))


def start_text(folder: Path) -> None:
    """What a start reads for text, and some text."""
    open_checkpoint(folder)
    tokenizer, template = load_tokenizer(folder), load_chat_template(folder)
    tokenizer.decode(tokenizer.encode("Hello, wörld! 123 <|im_end|>"), skip_special_tokens=False)
    tokenizer.token_bytes(tokenizer.vocab_size)
    if template is not None:
        template.render_ids(tokenizer, MESSAGES)


class Adapted:
    """Reads an adapter for the model beside it, which is loaded once."""

    def __init__(self) -> None:
        self.adapters: Adapters | None = None

    def __call__(self, folder: Path) -> None:
        if self.adapters is None:
            assembly = assembled(folder)
            self.adapters = Adapters(assembly.ops, assembly.dtype)
            load_model(assembly, adapters=self.adapters)
        self.adapters.make("x", read_adapter(folder))


def write_model(folder: Path, model: Path) -> None:
    """The tiny Llama, with every file that a hub's folder may have."""
    shutil.copytree(model, folder, dirs_exist_ok=True)
    template = json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
    (folder / "chat_template.jinja").write_text(template)
    (folder / "generation_config.json").write_text('{"eos_token_id": [258, 256], "bos_token_id": 256}')
    tokens = {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>", "special": True}}
    (folder / "special_tokens_map.json").write_text(json.dumps(tokens))
    config = json.loads((folder / "config.json").read_text())
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    (folder / "config.json").write_text(json.dumps(config | {"head_dim": 16, "rope_scaling": rope}))


def write_sharded(folder: Path, model: Path) -> None:
    write_model(folder, model)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    header = read_header(folder / "model-00001-of-00001.safetensors")[0]
    index = {"weight_map": dict.fromkeys(sorted(header), "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_qwen1(folder: Path, model: Path) -> None:
    write_model(folder, model)
    (folder / "tokenizer.json").unlink()
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "QWenTokenizer"}')
    (folder / "generation_config.json").write_text('{"chat_format": "chatml", "eos_token_id": 261}')
    lines = (f"{b64encode(token).decode()} {rank}\n" for rank, token in enumerate(TOKENS))
    (folder / "qwen.tiktoken").write_text("".join(lines))


def write_adapter(case: str) -> Write:
    def write(folder: Path, model: Path) -> None:
        shutil.copytree(ADAPTERS / case, folder, dirs_exist_ok=True)

    return write


@dataclass(frozen=True)
class Case:
    """What writes a sound folder, given that of a tiny Llama; the file of it that is broken; and what reads it."""

    write: Write
    file: str
    read: Callable[[Path], None]


def write_family(family: str) -> Write:
    """One of the random checkpoints that transformers makes for the models' tests."""

    def write(folder: Path, model: Path) -> None:
        sys.path[:0] = [str(TESTS / "models")]
        from checkpoints import make_reference

        reference = make_reference(family)
        (folder / "config.json").write_text(json.dumps(reference.config, default=str))
        tensors = reference.weights.tensors
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors")

    return write


TEXTS = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json")
CASES = {
    "config": Case(write_model, "config.json", start),
    "safetensors": Case(write_model, "model.safetensors", start),
    "index": Case(write_sharded, "model.safetensors.index.json", start),
    **{name: Case(write_model, name, start_text) for name in (*TEXTS, "chat_template.jinja")},
    "qwen.tiktoken": Case(write_qwen1, "qwen.tiktoken", start_text),
    **{f"config-of-{name}": Case(write_adapter(name), "adapter_config.json", Adapted()) for name in ADAPTED},
    **{f"updates-of-{name}": Case(write_adapter(name), "adapter_model.safetensors", Adapted()) for name in ADAPTED},
}
FAMILIES = {  # which transformers has to make first
    name.replace(" ", "-"): Case(write_family(name), "config.json", load)
    for name in (
        "qwen2 sliding",
        "qwen3 moe",
        "qwen3 next",
        "qwen2 vl vision",
        "qwen3 vl moe vision",
        "qwen3 omni vision",
        "llama vision",
        "qwen3.5 moe vision",
        "qwen4 exp long ngrams vision",
        "llama yarn scales",
        "llama4 chunks",
    )
}


def change_file(path: Path, rng: random.Random) -> None:
    if path.suffix == ".json" and rng.random() < 0.7:
        value = json.loads(path.read_text())
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            change_json(value, rng)
        path.write_text(json.dumps(value))
    else:
        change_bytes(path, rng)


def change_json(value: dict[str, Any] | list[Any], rng: random.Random) -> None:
    """Of some place, at any depth: junk, or gone."""
    keys: list[Any] = [*value, "extra"] if isinstance(value, dict) else list(range(len(value)))
    key = rng.choice(keys)
    inner = value.get(key) if isinstance(value, dict) else value[key]
    if isinstance(inner, dict | list) and inner and rng.random() < 0.8:
        change_json(inner, rng)
    elif rng.random() < 0.2 and key != "extra":
        del value[key]
    else:
        value[key] = copy.deepcopy(rng.choice(JUNK + FURTHER))


def fuzz(name: str, num: int, model: Path, seed: int = 0) -> Counter[str]:
    """fuzzing.fuzz of a file; `model`: the folder of a tiny Llama."""
    case = (CASES | FAMILIES)[name]
    with tempfile.TemporaryDirectory() as sound:
        case.write(Path(sound), model)
        case.read(Path(sound))

        def write(folder: Path, rng: random.Random) -> None:
            shutil.rmtree(folder)
            shutil.copytree(sound, folder)
            change_file(folder / case.file, rng)

        return fuzzing.fuzz(name, num, seed, write, case.read)


if __name__ == "__main__":
    from conftest import write_tiny_llama, write_tiny_tokenizer

    with tempfile.TemporaryDirectory() as tiny:
        write_tiny_tokenizer(Path(tiny))
        write_tiny_llama(Path(tiny), layers=1)
        fuzzing.main(CASES | FAMILIES, lambda name, num: fuzz(name, num, Path(tiny)))
