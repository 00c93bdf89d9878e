"""LoRA adapters as PEFT saves them: adapter_config.json beside adapter_model.safetensors.

Layout after https://huggingface.co/docs/peft/developer_guides/checkpoint: the update of a linear W is scale * B A, its
tensors `base_model.model.{the linear's prefix}.lora_A.weight` [r, K] and `.lora_B.weight` [N, r]; of an embedding's
table, transposed, `.lora_embedding_A` [r, V] and `.lora_embedding_B` [N, r]. Where embedding or head are changed the
model's own tensor is there too, as `.base_layer.weight`; it is the model's, and not read.
"""

from __future__ import annotations

import logging
import math
import re
from typing import TYPE_CHECKING, Any

import msgspec

from blade.checkpoint.json_file import read_json
from blade.checkpoint.safetensors import MappedFile
from blade.errors import CheckpointError
from blade.types import LowRank

if TYPE_CHECKING:
    from pathlib import Path

log = logging.getLogger("blade.lora")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MOST_RANK = 1024
_NAME = re.compile(
    r"base_model\.model\.(?P<prefix>[\w.]+)\.lora_((?P<side>[AB])(\.default)?\.weight|embedding_(?P<table>[AB]))",
    re.ASCII,
)
_BASE = re.compile(r"base_model\.model\.(?P<prefix>[\w.]*(lm_head|embed_tokens|wte))(\.base_layer)?\.weight", re.ASCII)
_PLAIN = re.compile(r"[\w.]+", re.ASCII)  # of a pattern: a module's name, or how it ends


class AdapterConfig(msgspec.Struct, frozen=True):
    """What matters of adapter_config.json; PEFT writes much more."""

    peft_type: str
    r: int
    lora_alpha: float
    use_rslora: bool = False
    use_dora: bool = False
    fan_in_fan_out: bool = False
    bias: str = "none"
    modules_to_save: list[str] | None = None
    alpha_pattern: dict[str, float] | None = None

    def scale(self, prefix: str, rank: int) -> float:
        """By what B A is multiplied (rsLoRA: Kalajdzievski 2023)."""
        patterns = self.alpha_pattern or {}
        key = next((key for key in patterns if prefix == key or prefix.endswith(f".{key}")), None)
        alpha = self.lora_alpha if key is None else patterns[key]
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def read_adapter(folder: Path) -> dict[str, LowRank]:
    """The update of each linear by its prefix. Raises CheckpointError, one sentence, for what is not sound, and for
    the kinds of adapter that are more than an update of linears."""
    config, path = _read_config(folder), folder / WEIGHTS
    if not path.is_file():
        remedy = "blade reads no pickles: save it with safe_serialization=True." if any(folder.glob("*.bin")) else ""
        raise CheckpointError(f"{folder} has no {WEIGHTS}.", remedy)
    file, halves = MappedFile(path), dict[str, dict[str, Any]]()
    for name, header in file.headers.items():
        if _BASE.fullmatch(name):
            log.info("%s: %r is taken for the model's own, and not read", path, name)
            continue
        match = _NAME.fullmatch(name)
        if match is None or len(header.shape) != 2 or not header.dtype.startswith(("F", "BF")):
            what = f"{name!r} of {header.dtype} {list(header.shape)}"
            raise CheckpointError(f"{path}: {what} is no part of a linear's update.")
        side = match["side"] or f"embedding_{match['table']}"
        if side in (half := halves.setdefault(match["prefix"], {})):
            raise CheckpointError(f"{path}: the update of {match['prefix']!r} comes twice.")
        half[side] = file.tensor(header)
    if not halves:
        raise CheckpointError(f"{path} holds no tensor.")
    return {prefix: _update(path, prefix, half, config) for prefix, half in halves.items()}


def _read_config(folder: Path) -> AdapterConfig:
    path = folder / CONFIG
    if not path.is_file():
        raise CheckpointError(f"{folder} has no {CONFIG}.", "Name the folder of a LoRA adapter in PEFT's format.")
    try:
        config = msgspec.convert(read_json(path), AdapterConfig)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{path} is not sound: {error}.") from None
    wrong = {
        f"peft_type {config.peft_type!r}": config.peft_type != "LORA",
        "use_dora": config.use_dora,
        "fan_in_fan_out": config.fan_in_fan_out,
        f"bias {config.bias!r}": config.bias != "none",
        f"modules_to_save {config.modules_to_save}": bool(config.modules_to_save),
    }
    if reason := next((what for what, is_so in wrong.items() if is_so), None):
        raise CheckpointError(
            f"{path}: {reason} is not served.", "blade serves LoRA updates of linears and embeddings."
        )
    if odd := next((key for key in config.alpha_pattern or {} if not _PLAIN.fullmatch(key)), None):
        raise CheckpointError(f"{path}: the pattern {odd!r} in alpha_pattern is not served.", "Name modules in full.")
    return config


def _update(path: Path, prefix: str, half: dict[str, Any], config: AdapterConfig) -> LowRank:
    of_table = half.keys() == {"embedding_A", "embedding_B"}
    if half.keys() != {"A", "B"} and not of_table:
        raise CheckpointError(f"{path}: {prefix!r} has lora_{next(iter(half))} alone.")
    a, b = (half[f"embedding_{side}" if of_table else side] for side in "AB")
    rank = a.shape[0]
    if b.shape[1] != rank or not 1 <= rank <= MOST_RANK:
        raise CheckpointError(f"{path}: {prefix!r} has lora_A {list(a.shape)} and lora_B {list(b.shape)}.")
    scale = config.scale(prefix, rank)
    if not math.isfinite(scale):
        raise CheckpointError(f"{path}: the scale of {prefix!r} is {scale}.")
    return LowRank(a, b, scale, of_table)
