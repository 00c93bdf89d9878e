"""LoRA adapters as PEFT saves them: adapter_config.json beside adapter_model.safetensors.

Layout after https://huggingface.co/docs/peft/developer_guides/checkpoint: the update of a linear W is scale * B A, its
tensors `base_model.model.{the linear's prefix}.lora_A.weight` [r, K] and `.lora_B.weight` [N, r]; of an embedding's
table, transposed, `.lora_embedding_A` [r, V] and `.lora_embedding_B` [N, r]. Where embedding or head are changed the
model's own tensor is there too, as `.base_layer.weight`; it is the model's, and not read. DoRA adds
`.lora_magnitude_vector` [N]. What has an update as a parameter and not as a linear, as all experts of a layer have, is
named by its module alone: see blade.nn.lora_experts.
"""

from __future__ import annotations

import logging
import math
import re
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from blade.checkpoint.json_file import read_json
from blade.checkpoint.safetensors import MappedFile
from blade.errors import CheckpointError
from blade.files import is_file
from blade.types import LowRank, RankScale

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

Number = TypeVar("Number", int, float)
log = logging.getLogger("blade.lora")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MOST_RANK = 1024
MOST_SCALE = 1e6  # far beyond any, and far within what float32 holds
KINDS = ("gate_up_proj", "down_proj")  # of the parameters that all experts of a layer are in
UNSERVED = ("alora_invocation_tokens", "layer_replication", "use_qalora", "use_bdlora", "kasa_config", "arrow_config")
_NAME = re.compile(
    r"base_model\.model\.(?P<prefix>[\w.]+)\."
    r"lora_((?P<side>[AB])(\.default)?\.weight|embedding_(?P<table>[AB])|(?P<length>magnitude_vector))",
    re.ASCII,
)
_BASE = re.compile(r"base_model\.model\.(?P<prefix>[\w.]*(lm_head|embed_tokens|wte))(\.base_layer)?\.weight", re.ASCII)
_EXPERTS = re.compile(r"(?P<module>.+\.experts)(\.base_layer)?", re.ASCII)
_WHOLE = ".*\\."  # what a pattern of PEFT's own begins with; as any does, it says how names end
_PLAIN = re.compile(rf"({re.escape(_WHOLE)})?[\w.]+", re.ASCII)  # of a pattern: a module's name, or how it ends


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
    rank_pattern: dict[str, int] | None = None
    alora_invocation_tokens: list[int] | None = None
    layer_replication: list[Any] | None = None
    use_qalora: bool = False
    use_bdlora: Any = None
    kasa_config: Any = None
    arrow_config: Any = None

    def scale(self, prefix: str, rank: int) -> float:
        """By what B A is multiplied (rsLoRA: Kalajdzievski 2023)."""
        alpha = _of(prefix, self.alpha_pattern, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def rank(self, prefix: str) -> int:
        return _of(prefix, self.rank_pattern, self.r)


def _of(prefix: str, patterns: Mapping[str, Number] | None, default: Number) -> Number:
    """What is said of it by the first pattern that it fits."""
    found = (value for key, value in (patterns or {}).items() if f".{prefix}".endswith(f".{key.removeprefix(_WHOLE)}"))
    return next(found, default)


def read_adapter(folder: Path) -> dict[str, LowRank]:
    """The update of each linear by its prefix. Raises CheckpointError, one sentence, for what is not sound, and for
    the kinds of adapter that are more than an update of linears."""
    config, path = _read_config(folder), folder / WEIGHTS
    if not is_file(path):
        remedy = "blade reads no pickles: save it with safe_serialization=True." if any(folder.glob("*.bin")) else ""
        raise CheckpointError(f"{folder} has no {WEIGHTS}.", remedy)
    file, halves = MappedFile(path), dict[str, dict[str, Any]]()
    for name, header in file.headers.items():
        if _BASE.fullmatch(name):
            log.info("%s: %r is taken for the model's own, and not read", path, name)
            continue
        match = _NAME.fullmatch(name)
        dims = 1 if match and match["length"] else 2
        if match is None or len(header.shape) != dims or not header.dtype.startswith(("F", "BF")):
            what = f"{name!r} of {header.dtype} {list(header.shape)}"
            raise CheckpointError(f"{path}: {what} is no part of a linear's update.")
        side = match["side"] or match["length"] or f"embedding_{match['table']}"
        if side in (half := halves.setdefault(match["prefix"], {})):
            raise CheckpointError(f"{path}: the update of {match['prefix']!r} comes twice.")
        half[side] = file.tensor(header)
    if not halves:
        raise CheckpointError(f"{path} holds no tensor.")
    return {prefix: _update(path, prefix, half, config) for prefix, half in halves.items()}


def _read_config(folder: Path) -> AdapterConfig:
    path = folder / CONFIG
    if not is_file(path):
        raise CheckpointError(f"{folder} has no {CONFIG}.", "Name the folder of a LoRA adapter in PEFT's format.")
    try:
        config = msgspec.convert(read_json(path), AdapterConfig)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{path} is not sound: {error}.") from None
    wrong = {
        f"peft_type {config.peft_type!r}": config.peft_type != "LORA",
        "fan_in_fan_out": config.fan_in_fan_out,
        f"bias {config.bias!r}": config.bias != "none",
        f"modules_to_save {config.modules_to_save}": bool(config.modules_to_save),
        **{key: bool(getattr(config, key)) for key in UNSERVED},
    }
    if reason := next((what for what, is_so in wrong.items() if is_so), None):
        raise CheckpointError(
            f"{path}: {reason} is not served.", "blade serves LoRA updates of linears and embeddings."
        )
    if odd := next((key for key in config.alpha_pattern or {} if not _PLAIN.fullmatch(key)), None):
        raise CheckpointError(f"{path}: the pattern {odd!r} in alpha_pattern is not served.", "Name modules in full.")
    return config


def _update(path: Path, prefix: str, half: dict[str, Any], config: AdapterConfig) -> LowRank:
    magnitude = half.pop("magnitude_vector", None)
    of_table = half.keys() == {"embedding_A", "embedding_B"}
    if half.keys() != {"A", "B"} and not of_table:
        raise CheckpointError(f"{path}: {prefix!r} has lora_{next(iter(half), 'magnitude_vector')} alone.")
    a, b = (half[f"embedding_{side}" if of_table else side] for side in "AB")
    if b.shape[1] != len(a) or not len(a):
        raise CheckpointError(f"{path}: {prefix!r} has lora_A {list(a.shape)} and lora_B {list(b.shape)}.")
    if config.use_dora is not (magnitude is not None):
        has = "no" if magnitude is None else "a"
        raise CheckpointError(f"{path}: {prefix!r} has {has} lora_magnitude_vector; use_dora is {config.use_dora}.")
    experts = _EXPERTS.fullmatch(prefix)
    if magnitude is not None and (of_table or experts or magnitude.shape != b.shape[:1]):
        raise CheckpointError(
            f"{path}: {prefix!r} has lora_magnitude_vector {list(magnitude.shape)}, and lora_B {list(b.shape)}.",
            "blade serves DoRA of linears alone.",
        )
    if experts:
        return LowRank(
            a, b, 1.0, experts={kind: _of_all(path, f"{experts['module']}.{kind}", config) for kind in KINDS}
        )
    return LowRank(a, b, _scale(path, prefix, len(a), config), of_table, magnitude)


def _scale(path: Path, prefix: str, rank: int, config: AdapterConfig) -> float:
    told = {config.r, *(config.rank_pattern or {}).values()}
    if rank not in told:
        raise CheckpointError(
            f"{path}: {prefix!r} is of rank {rank}; by {CONFIG} it would be {' or '.join(map(str, sorted(told)))}.",
            "Fetch both files again.",
        )
    scale = config.scale(prefix, rank) if 1 <= rank <= MOST_RANK else math.nan
    if not abs(scale) <= MOST_SCALE:
        raise CheckpointError(f"{path}: the scale of {prefix!r}, of rank {rank}, is {scale}.")
    return scale


def _of_all(path: Path, parameter: str, config: AdapterConfig) -> RankScale:
    """What the update of all experts' matrices has, whose shapes alone do not tell."""
    if odd := next((key for key in config.rank_pattern or {} if not _PLAIN.fullmatch(key)), None):
        raise CheckpointError(
            f"{path}: the pattern {odd!r} in rank_pattern is not served where experts are changed.",
            "Give their names.",
        )
    rank = config.rank(parameter)
    return RankScale(rank, _scale(path, parameter, rank, config))
