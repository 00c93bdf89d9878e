"""Broken GGUF files: each is refused in one sentence, or served without an exception.

PYTHONPATH=tests python tests/models/gguf_mutations.py 2000 [CASE ...]   # `just fuzz-gguf`
"""

from __future__ import annotations

import copy
import random
import struct
from collections import Counter
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import fuzzing
from checkpoints import Reference
from stepper import Stepper, all_together

from blade.checkpoint.gguf import GGMLType, read_gguf
from blade.checkpoint.open import open_checkpoint
from blade.nn.grouped import Stored

FIXTURES = Path(__file__).parent / "fixtures"
ARCHITECTURES = sorted(path.stem for path in FIXTURES.glob("*.gguf"))
BLOCKED = [kind.name for kind in GGMLType if kind.bits]
CASES = [*ARCHITECTURES, *BLOCKED]
PROMPT = [3, 1, 4, 1, 5]
MAX_CONTEXT = 4096
BROKEN = "broken.gguf"
WIDTH = 256  # of the models in blocks
JUNK: list[Any] = [
    True, False, 0, -1, 1, 2, 3, 5, 7, 64, 2**31, 2**40, 2**63, 0.0, 0.5, -1.0, float("nan"), 1e30, "", "llama", "yarn",
    "linear", "x" * 300, [], [0], [True], ["a", "b"], [1, 2, 3, 4], [0.5],
]  # fmt: skip
NUM_MUTATIONS = (1, 1, 1, 2, 3)  # of one file


@dataclass
class Tensor:
    kind: int
    shape: tuple[int, ...]  # outermost first
    data: bytes


@dataclass(frozen=True)
class Raw:
    """A value of the metadata that no Python object stands for: GGUF's number of the type, and the bytes."""

    kind: int
    data: bytes


@dataclass
class Content:
    """Of a GGUF file."""

    metadata: dict[str, Any]
    tensors: dict[str, Tensor]


def content_of(case: str) -> Content:
    if case in ARCHITECTURES:
        file = read_gguf(FIXTURES / f"{case}.gguf")
        parts = {
            name: Tensor(info.kind, info.shape, file.memory[info.offset : info.offset + info.num_bytes])
            for name, info in file.tensors.items()
        }
        return Content(file.metadata, parts)
    return in_blocks(GGMLType[case])


def in_blocks(kind: GGMLType, vocab_size: int = 40) -> Content:
    """A Llama of one layer, its matrices of random blocks."""
    rng = random.Random(kind)
    matrices = dict.fromkeys(("attn_q", "attn_output", "ffn_gate", "ffn_up", "ffn_down"), (WIDTH, WIDTH))
    matrices |= {"attn_k": (WIDTH // 2, WIDTH), "attn_v": (WIDTH // 2, WIDTH)}
    shapes = {"token_embd": (vocab_size, WIDTH)} | {f"blk.0.{name}": shape for name, shape in matrices.items()}
    tensors = {
        f"{name}.weight": Tensor(kind, shape, rng.randbytes(prod(shape) // kind.block_size * kind.block_bytes))
        for name, shape in shapes.items()
    }
    ones = Tensor(GGMLType.F32, (WIDTH,), struct.pack("<f", 1.0) * WIDTH)
    tensors |= {f"{name}.weight": ones for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm")}
    keys = {"block_count": 1, "context_length": 64, "embedding_length": WIDTH, "feed_forward_length": WIDTH}
    keys |= {"attention.head_count": 4, "attention.head_count_kv": 2}
    metadata = {"general.architecture": "llama"} | {f"llama.{key}": value for key, value in keys.items()}
    return Content(metadata | {"llama.attention.layer_norm_rms_epsilon": 1e-5}, tensors)


def written(content: Content) -> bytes:
    header = struct.pack("<4sIQQ", b"GGUF", 3, len(content.tensors), len(content.metadata))
    for key, value in content.metadata.items():
        kind, packed = packed_value(value)
        header += text(key) + struct.pack("<I", kind) + packed
    offset, data = 0, b""
    for name, tensor in content.tensors.items():
        sizes = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape[::-1])
        header += text(name) + sizes + struct.pack("<IQ", tensor.kind, offset)
        data += tensor.data + bytes(-len(tensor.data) % 32)
        offset = len(data)
    return header + bytes(-len(header) % 32) + data


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def packed_value(value: Any) -> tuple[int, bytes]:
    """GGUF's number of the type, and the bytes."""
    if isinstance(value, Raw):
        return value.kind, value.data
    if isinstance(value, list):
        items = [packed_value(item) for item in value]
        return 9, struct.pack("<IQ", items[0][0] if items else 4, len(items)) + b"".join(packed for _, packed in items)
    if isinstance(value, str):
        return 8, text(value)
    if isinstance(value, bool):
        return 7, struct.pack("<?", value)
    if isinstance(value, float):
        return 6, struct.pack("<f", value)
    return (10, struct.pack("<Q", value)) if value >= 0 else (11, struct.pack("<q", value))


def mutated(content: Content, rng: random.Random) -> bytes:
    """The file, changed in some places."""
    content = copy.deepcopy(content)
    kinds = [rng.choice(["key", "key", "tensor", "tensor", "bytes"]) for _ in range(rng.choice(NUM_MUTATIONS))]
    for kind in kinds:
        if kind == "key":
            key = rng.choice([key for key in content.metadata if not key.startswith("tokenizer.")])
            if rng.random() < 0.2:
                del content.metadata[key]
            else:
                content.metadata[key] = copy.deepcopy(rng.choice(JUNK))
        elif kind == "tensor":
            change_tensor(content.tensors, rng)
    data = bytearray(written(content))
    if "bytes" in kinds:
        change_bytes(data, rng)
    return bytes(data)


def change_tensor(tensors: dict[str, Tensor], rng: random.Random) -> None:
    name = rng.choice(list(tensors))
    tensor, (other, another) = tensors[name], rng.choices(list(tensors.items()), k=2)[0]
    change = rng.choice(["gone", "kind", "shape", "random", "fill", "name", "swap"])
    if change == "gone":
        del tensors[name]
    elif change == "kind":
        kind = rng.choice(list(GGMLType))
        size = prod(tensor.shape) // kind.block_size * kind.block_bytes
        tensors[name] = replace(tensor, kind=kind, data=rng.randbytes(size))
    elif change == "shape":
        shapes = [tensor.shape[::-1], (*tensor.shape, 1), (1, *tensor.shape), (prod(tensor.shape),), tensor.shape[:1]]
        tensors[name] = replace(tensor, shape=rng.choice(shapes))
    elif change == "random":
        tensors[name] = replace(tensor, data=rng.randbytes(len(tensor.data)))
    elif change == "fill":
        tensors[name] = replace(tensor, data=bytes([rng.choice([0, 127, 128, 255])]) * len(tensor.data))
    elif change == "name":
        tensors[rng.choice([name.replace("blk.0", "blk.9"), f"{name}x", "blk.0.ssm_a", "rope_freqs.weight"])] = tensor
    else:
        tensors[name], tensors[other] = another, tensor


def change_bytes(data: bytearray, rng: random.Random) -> None:
    if rng.random() < 0.2:
        del data[rng.randrange(len(data)) :]
    for _ in range(rng.randint(1, 4)):
        if data:
            place = rng.randrange(min(len(data), 6000) if rng.random() < 0.8 else len(data))
            data[place] = rng.randrange(256)


def serve(path: Path) -> None:
    """All that a start does with the weights, and some steps. Raises what that raises."""
    checkpoint = open_checkpoint(path)
    weights: Any = checkpoint.weights
    context = min(MAX_CONTEXT, checkpoint.config["max_position_embeddings"])  # for time's sake
    reference = Reference(checkpoint.config | {"max_position_embeddings": context}, weights, [PROMPT], [])
    quantization = Stored(checkpoint.blocks) if checkpoint.blocks else None
    Stepper(reference, quantization=quantization).run(all_together([len(PROMPT)], seed=0))


def fuzz(case: str, num: int, seed: int = 0) -> Counter[str]:
    """fuzzing.fuzz of a file."""
    content = content_of(case)

    def write(folder: Path, rng: random.Random) -> None:
        path = folder / BROKEN
        path.unlink(missing_ok=True)  # it may be mapped
        path.write_bytes(mutated(content, rng))

    return fuzzing.fuzz(case, num, seed, write, lambda folder: serve(folder / BROKEN))


if __name__ == "__main__":
    fuzzing.main(CASES, fuzz)
