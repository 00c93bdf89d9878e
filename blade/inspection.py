"""`blade inspect`: what a checkpoint is, and whether and how fast blade can run it here; no weights are loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from blade.assembly import check_shapes, choose, load_text, own_heads, tokenizer_source
from blade.checked import text_section
from blade.checkpoint.open import open_checkpoint
from blade.checkpoint.progress import console_progress
from blade.checkpoint.source import resolve
from blade.engine.memory import size
from blade.engine.states import PER_SEQUENCE
from blade.errors import BladeError, CheckpointError, shown

if TYPE_CHECKING:
    from collections.abc import Iterator

    from blade.assembly import Assembly
    from blade.checkpoint.open import Checkpoint
    from blade.config import Config
    from blade.plugins import Plugins

# What a token of a single request costs on a CPU, measured with models of 0.1 to 1.8 billion parameters on two cores of
# a Zen 3 and two of an Emerald Rapids, and by which share of itself each cost was off there.
SHARE = 0.85  # of the rate at which so many bytes can be read over and over, at which the weights stream
LAYER_SECONDS = 45e-6  # for all that is no weight
TOKEN_SECONDS = 0.7e-3  # to sample it, and to send it
OFF_STREAM, OFF_REST = 0.15, 0.5

EMBEDDINGS, NGRAMS, HEAD = ("embed_tokens", "wte"), "ngram_embedding", "lm_head"  # what families call them


class Served(msgspec.Struct, frozen=True, kw_only=True):
    """How blade runs a checkpoint here. Sizes in bytes."""

    plugin: str  # that brought the family
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_context: int  # tokens
    weights: str  # their form once loaded
    weight_bytes: int
    kv_token_bytes: int  # of the KV cache, for each token
    kv_full_context_bytes: int
    state_bytes: int  # that recurrent layers keep of each request, however long; 0 without such layers
    available_bytes: int  # of device memory
    device: str
    dtype: str
    bytes_per_token: int  # of weights, read for each token of a single request
    bandwidth: float | None  # of memory and caches for so much, bytes per second, as just measured; null: unknown
    tokens_per_second: float | None  # of a single request with a short context: estimated from all this
    margin: float | None  # the share of it that it may be off by
    heads: str | None = None  # the --drafter that reads heads in this checkpoint; null: there are none
    head_bytes: int = 0  # that it takes beside the weights


class Inspection(msgspec.Struct, frozen=True, kw_only=True):
    """What `blade inspect --json` prints."""

    name: str
    path: str
    format: str  # of the files
    architectures: list[str]
    num_params: int
    stored_bytes: int
    tokenizer: str | None = None  # the files that it is read from; null: there are none, or the model is not served
    problem: str | None = None  # why it cannot be served here, and the remedy
    served: Served | None = None  # null: it cannot, whatever the machine


def inspect(config: Config, plugins: Plugins) -> Inspection:
    """Raises CheckpointError, ConfigError or PluginError where not even the files can be read."""
    if config.model.model is None:
        return _served(choose(config, plugins))
    with console_progress() as progress:
        path = resolve(config.model, None, progress)
    checkpoint = open_checkpoint(path)
    try:
        return _served(choose(config, plugins))
    except CheckpointError as error:
        return Inspection(**_files(checkpoint), problem=str(error))


def _files(checkpoint: Checkpoint) -> dict[str, Any]:
    names = checkpoint.config.get("architectures")
    return {
        "name": checkpoint.name,
        "path": str(checkpoint.path),
        "format": checkpoint.format,
        "architectures": [str(name) for name in names] if isinstance(names, list) else [],
        "num_params": checkpoint.num_params,
        "stored_bytes": checkpoint.num_bytes,
    }


def _served(assembly: Assembly) -> Inspection:
    model, block_size = assembly.model_config, assembly.config.engine.block_size
    bytes_per_token, bytes_read = _bytes_read(assembly)
    bandwidth = assembly.ops.memory_bandwidth(bytes_read)
    speed, margin = _speed(bytes_per_token, bandwidth, model.num_layers) if bandwidth else (None, None)
    heads = assembly.draft if assembly.draft and assembly.draft.head else own_heads(assembly)
    served = Served(
        plugin=assembly.family,
        num_layers=model.num_layers,
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        vocab_size=model.vocab_size,
        max_context=assembly.max_context,
        weights=assembly.form.label,
        weight_bytes=assembly.weight_bytes,
        kv_token_bytes=assembly.block_bytes // block_size,
        kv_full_context_bytes=-(-assembly.max_context // block_size) * assembly.block_bytes,
        state_bytes=PER_SEQUENCE * assembly.state_bytes,
        available_bytes=assembly.ops.available_memory(),
        device=assembly.ops.name,
        dtype=str(assembly.dtype).removeprefix("torch."),
        bytes_per_token=bytes_per_token,
        bandwidth=bandwidth,
        tokens_per_second=speed,
        margin=margin,
        heads=heads.drafter if heads else None,
        head_bytes=heads.weight_bytes if heads else 0,
    )
    files = _files(assembly.checkpoint) | {"name": assembly.model_name, "num_params": assembly.num_params}
    return Inspection(**files, tokenizer=tokenizer_source(assembly), problem=_problem(assembly), served=served)


def _speed(num_bytes: int, bandwidth: float, num_layers: int) -> tuple[float, float]:
    """Tokens per second, and the share that they may be off by."""
    stream, rest = num_bytes / (SHARE * bandwidth), num_layers * LAYER_SECONDS + TOKEN_SECONDS
    return 1 / (stream + rest), (stream * OFF_STREAM + rest * OFF_REST) / (stream + rest)


def _problem(assembly: Assembly) -> str | None:
    """The first that a start would end with."""
    try:
        check_shapes(assembly)
        load_text(assembly)
    except BladeError as error:
        return str(error)
    return _memory_problem(assembly)


def _memory_problem(assembly: Assembly) -> str | None:
    available = assembly.ops.available_memory()
    if assembly.weight_bytes > available:
        return f"The weights take {size(assembly.weight_bytes)}, of the device's memory {size(available)} are free."
    try:
        assembly.plan_memory(reserved=assembly.weight_bytes)
    except BladeError as error:
        return str(error)
    return None


def _bytes_read(assembly: Assembly) -> tuple[int, int]:
    """For a token, and for any of them: all weights, but for embeddings where they are not the output matrix too; of
    experts a token reads those that are chosen for it."""
    from blade.nn.tensors import loaded_bytes, split_name

    weights, quantization = assembly.weights, assembly.form.quantization
    part_of = {name: split_name(name)[0].rpartition(".")[2] for name in weights.names()}  # whatever the model's prefix
    unread = {NGRAMS, *(EMBEDDINGS if HEAD in part_of.values() else ())}
    per_token, total = 0.0, 0
    for name, part in part_of.items():
        if part in unread:
            continue
        num_bytes = loaded_bytes(name, weights, assembly.ops, assembly.dtype, quantization)
        per_token += num_bytes * (_share_of_experts(assembly.checkpoint.config) if ".experts." in name else 1)
        total += num_bytes
    return int(per_token), total


def _share_of_experts(config: dict[str, Any]) -> float:
    """That compute a token."""
    settings = text_section(config)
    chosen = settings.get("num_experts_per_tok")
    total = settings.get("num_experts") or settings.get("num_local_experts")
    return chosen / total if isinstance(chosen, int) and isinstance(total, int) and total >= chosen > 0 else 1


def lines(found: Inspection) -> Iterator[str]:
    """The same for a person."""
    return map(shown, _lines(found))


def _lines(found: Inspection) -> Iterator[str]:
    served = found.served
    yield f"model    {found.name} ({found.path})"
    yield f"family   {', '.join(found.architectures) or 'none stated'}{_shape(served) if served else ''}"
    yield f"files    {found.format}, {found.num_params / 1e6:,.0f} M parameters in {size(found.stored_bytes)}"
    if served:
        yield f"text     tokenizer from {found.tokenizer}" if found.tokenizer else "text     no tokenizer"
        yield from _resources(served)
    if found.problem:
        yield f"problem  {found.problem}"
    elif served:
        yield f"here     it runs on {served.device}, in {served.dtype}"
        if served.bandwidth and served.tokens_per_second and served.margin:
            yield (
                f"speed    about {served.tokens_per_second:.0f} tokens/s, give or take {served.margin:.0%}, for one "
                f"request: {size(served.bytes_per_token)} of weights are read for each, which come at "
                f"{served.bandwidth / 1e9:.0f} GB/s now"
            )


def _shape(served: Served) -> str:
    return (
        f" by plugin {served.plugin!r}: {served.num_layers} layers, {served.num_heads} heads ({served.num_kv_heads} of "
        f"keys and values) of {served.head_dim}, {served.vocab_size:,} tokens in the vocabulary"
    )


def _resources(served: Served) -> Iterator[str]:
    full = served.kv_full_context_bytes
    yield f"weights  {size(served.weight_bytes)}, {served.weights}"
    yield (
        f"context  {served.max_context:,} tokens; the KV cache takes {size(served.kv_token_bytes)} for each, "
        f"{size(full)} for all"
    )
    if served.state_bytes:
        yield f"states   of recurrent layers: {size(served.state_bytes)} for each request that runs"
    if served.heads:
        yield f"heads    of its own to draft with, {size(served.head_bytes)}, for --drafter {served.heads}"
    needed = size(served.weight_bytes + full + served.state_bytes)
    yield f"memory   {needed} for the weights and one full context; {size(served.available_bytes)} are free"
