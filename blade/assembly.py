"""From a Config to an engine: choose every part by name, load the weights, size the KV cache."""

from __future__ import annotations

import logging
import secrets
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from blade.config import ModelOptions
from blade.errors import CheckpointError, ConfigError
from blade.types import CaptureOptions, KVSpec, Limits

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from blade.checkpoint.open import Checkpoint
    from blade.config import Config
    from blade.contracts import Architecture, Attention, DraftModel, Executor, Model, Ops, Weights
    from blade.engine.blocks import BlockPool
    from blade.engine.engine import Engine
    from blade.engine.memory import MemoryPlan
    from blade.engine.speculation import Speculator
    from blade.nn.lora import Adapters
    from blade.plugins import Plugins
    from blade.quantization import WeightForm
    from blade.registry import Registry
    from blade.types import DefaultCheckpoint, ModelConfig

log = logging.getLogger("blade.assembly")

DRAFT_MODEL = "model"  # the drafter that --draft.model implies


@dataclass(frozen=True)
class Assembly:
    """Everything chosen, nothing heavy loaded yet."""

    config: Config
    plugins: Plugins
    checkpoint: Checkpoint
    weights: Weights  # the checkpoint's, as the architecture sees them
    architecture: Architecture
    family: str  # the plugin that brought the architecture
    form: WeightForm
    model_config: ModelConfig
    model_name: str
    max_context: int  # tokens
    ops: Ops
    attention: Attention
    dtype: torch.dtype
    draft: Assembly | None = None  # of the draft model; ops and attention are the same

    @property
    def kv_spec(self) -> KVSpec:
        model = self.model_config
        return KVSpec(
            num_layers=model.num_kv_layers,
            num_heads=model.num_heads,
            num_kv_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            dtype=str(self.dtype).removeprefix("torch."),
            block_size=self.config.engine.block_size,
            storage=None if self.config.engine.kv_cache_quant == "none" else self.config.engine.kv_cache_quant,
        )

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights once loaded, the draft model's included; a tied embedding counts once."""
        from blade.nn.tensors import loaded_bytes

        weights, quantization = self.weights, self.form.quantization
        own = sum(loaded_bytes(name, weights, self.ops, self.dtype, quantization) for name in weights.names())
        return own + (self.draft.weight_bytes if self.draft else 0)

    @property
    def num_params(self) -> int:
        """Numbers in the checkpoint's tensors, however they are packed; without the draft model's."""
        from blade.nn.tensors import num_params

        return num_params(self.checkpoint.weights, self.form.quantization)

    @property
    def block_bytes(self) -> int:
        """Of a block of the KV cache over all layers; the draft model has as many blocks of its own."""
        return self.attention.block_bytes(self.kv_spec) + (self.draft.block_bytes if self.draft else 0)

    @property
    def state_bytes(self) -> int:
        """Of one state of all recurrent layers; 0 where there are none."""
        from blade.engine.state_cache import state_bytes

        return state_bytes(self.model_config, self.dtype)

    @property
    def drafters(self) -> tuple[str, ...]:
        """Names, in the order in which they are asked."""
        named = tuple(dict.fromkeys(self.config.engine.drafter))
        return named or ((DRAFT_MODEL,) if self.draft else ())

    @property
    def capture(self) -> CaptureOptions:
        config = self.config.engine
        sizes = [size for size in config.cuda_graph_batch_sizes if size <= config.max_num_seqs]
        return CaptureOptions(
            enabled=not config.disable_cuda_graph,
            batch_sizes=tuple(sizes),
            block_size=config.block_size,
            max_context=self.max_context,
        )

    def plan_memory(self, reserved: int = 0) -> MemoryPlan:
        """Size the KV cache from the memory free now, less `reserved` bytes (of weights not loaded yet)."""
        from blade.engine.memory import plan_memory

        available = max(0, self.ops.available_memory() - reserved)
        on_cpu = self.ops.device.type == "cpu"
        sizes = self.block_bytes, self.max_context, on_cpu, self.state_bytes
        return plan_memory(self.config.engine, available, *sizes)


def choose(config: Config, plugins: Plugins, to_load: bool = False) -> Assembly:
    """Resolve every name of the config; with `to_load`, the weights are about to be loaded. Raises ConfigError,
    PluginError or CheckpointError with a remedy."""
    assembly = _choose(config, plugins, to_load)
    if config.draft.model is None:
        if DRAFT_MODEL in config.engine.drafter:
            raise ConfigError(f"--drafter {DRAFT_MODEL} has no model to draft with.", "Name one with --draft.model.")
        return assembly
    options = {field.name: getattr(config.draft, field.name) for field in fields(config.draft)}
    draft = _choose(replace(config, model=ModelOptions(**options)), plugins, target=assembly)
    if draft.model_config.state is not None:
        raise ConfigError(
            f"--draft.model {draft.model_name} has recurrent layers, which cannot take back what they drafted.",
            "Choose a draft model with attention alone, or --drafter suffix.",
        )
    return replace(assembly, draft=replace(draft, max_context=min(draft.max_context, assembly.max_context)))


def _choose(config: Config, plugins: Plugins, to_load: bool = False, target: Assembly | None = None) -> Assembly:
    """`target`: the model that this one drafts for."""
    from blade.checkpoint.open import open_checkpoint
    from blade.checkpoint.progress import console_progress
    from blade.checkpoint.source import resolve
    from blade.quantization import check_quantize, choose_form

    _check_names(config, plugins)
    check_quantize(config.model.quantize, plugins)
    backends = plugins.registry("register_backends")
    default = _default_checkpoint(config, plugins)
    with console_progress() as progress:
        path = resolve(config.model, default, progress)
    if to_load:
        _prepare(config, path, backends)
    checkpoint = open_checkpoint(path)  # the last thing that needs no torch
    family, architecture = _architecture(checkpoint, plugins)
    model_config = architecture.configure(checkpoint.config)
    seen = getattr(architecture, "weights", None)
    weights: Weights = seen(checkpoint.config, checkpoint.weights) if seen else checkpoint.weights
    device, threads = _device(config.engine.device), config.engine.threads
    ops: Ops = target.ops if target else backends.create(device, threads)
    dtype = _dtype(config, ops)
    make_attention = plugins.registry("register_attention").create
    attention: Attention = target.attention if target else make_attention(config.engine.attention, ops)
    _check_kv_cache(config, attention, ops)
    return Assembly(
        config=config,
        plugins=plugins,
        checkpoint=checkpoint,
        weights=weights,
        architecture=architecture,
        family=family,
        form=choose_form(checkpoint, config.model.quantize, ops, dtype, plugins),
        model_config=model_config,
        model_name=config.model.served_model_name or _name(checkpoint, default),
        max_context=_max_context(config, model_config, attention),
        ops=ops,
        attention=attention,
        dtype=dtype,
    )


def load_model(
    assembly: Assembly, advance: Callable[[int], None] | None = None, adapters: Adapters | None = None
) -> Model:
    """Load the weights; `advance` is told the bytes of each tensor once it is in, `adapters` what they may change."""
    from blade.nn import Loader

    weights, quantization = assembly.weights, assembly.form.quantization
    loader = Loader(weights, assembly.ops, assembly.attention, assembly.dtype, quantization, advance, adapters)
    return assembly.architecture.build(replace(assembly.model_config, max_context=assembly.max_context), loader)


def make_adapters(assembly: Assembly) -> Adapters | None:
    """For `load_model`; None where none were asked for, so that linears are called without a detour."""
    from blade.nn.lora import Adapters

    options = assembly.config.model
    return Adapters(assembly.ops, assembly.dtype) if options.lora or options.lora_dir else None


def build_engine(
    assembly: Assembly,
    model: Model,
    memory: MemoryPlan,
    draft: Model | None = None,
    adapters: Adapters | None = None,
) -> Engine:
    """Allocate the KV cache and put the engine together; it is not started. `draft`: assembly.draft's model;
    `adapters`: those that the model was loaded with."""
    from blade.engine.blocks import BlockPool
    from blade.engine.engine import Engine
    from blade.engine.runner import ModelRunner
    from blade.engine.state_cache import with_states
    from blade.engine.states import PER_SEQUENCE, StatePool

    plugins, config = assembly.plugins, assembly.config.engine
    states = StatePool(memory.num_states) if memory.num_states else None
    if states is not None:
        config = replace(config, max_num_seqs=min(config.max_num_seqs, memory.num_states // PER_SEQUENCE))
    secret = secrets.randbits(64)
    kv = with_states(
        assembly.attention.allocate(assembly.kv_spec, memory.num_blocks),
        assembly.model_config,
        memory.num_states,
        assembly.dtype,
        assembly.ops.device,
    )
    executor = plugins.registry("register_executors").create(
        config.executor, lambda: ModelRunner(model, kv, assembly.ops, assembly.capture, secret, adapters), config
    )
    blocks = BlockPool(memory.num_blocks, config.block_size, config.prefix_cache, states)
    scheduler = plugins.registry("register_schedulers").create(config.scheduler, blocks, config)
    limits = Limits(assembly.model_config.vocab_size, assembly.max_context, config.max_num_seqs)
    draft_model = _draft_model(assembly.draft, draft, memory, secret) if assembly.draft and draft else None
    speculator = _speculator(assembly, executor, blocks, limits, draft_model) if assembly.drafters else None
    return Engine(executor, scheduler, blocks, config, limits, speculator)


def _draft_model(assembly: Assembly, model: Model, memory: MemoryPlan, secret: int) -> DraftModel:
    from blade.contracts import DraftModel
    from blade.engine.blocks import BlockPool
    from blade.engine.runner import ModelRunner

    config = assembly.config.engine
    kv = assembly.attention.allocate(assembly.kv_spec, memory.num_blocks)
    return DraftModel(
        ModelRunner(model, kv, assembly.ops, assembly.capture, secret),
        BlockPool(memory.num_blocks, config.block_size, config.prefix_cache),
        assembly.max_context,
    )


def _speculator(
    assembly: Assembly, executor: Executor, blocks: BlockPool, limits: Limits, draft_model: DraftModel | None
) -> Speculator:
    """With the cost of steps measured, where drafts are to be adapted to it."""
    from blade.engine.costs import StepCosts
    from blade.engine.drafting import GuardedDrafter
    from blade.engine.speculation import Speculator
    from blade.engine.warm_up import measure_costs, rehearse

    config, registry = assembly.config.engine, assembly.plugins.registry("register_drafters")
    drafters = [
        GuardedDrafter(name, registry.create(name, config, draft_model), limits.vocab_size)
        for name in assembly.drafters
    ]
    costs = None
    if config.adaptive_drafts:
        costs = StepCosts(measure_costs(executor, blocks, limits, config.max_batch_tokens))
        for drafter in drafters:
            rehearse(drafter, config.num_draft_tokens, limits.vocab_size)
    return Speculator(drafters, costs, config.num_draft_tokens, limits.max_context)


def _prepare(config: Config, path: Path, backends: Registry) -> None:
    """Let the device's backend begin; see hookspecs.register_backends."""
    from blade.checkpoint.open import stored_bytes
    from blade.quantization import NONE

    device = config.engine.device
    if device == "auto":  # asking torch would take as long as what is to be gained
        device = "cuda" if Path("/dev/nvidiactl").exists() else "cpu"
    begin = getattr(backends[device], "prepare", None)
    if begin is not None:
        begin(stored_bytes(path) // (1 if config.model.quantize in (None, NONE) else 4))


def _check_names(config: Config, plugins: Plugins) -> None:
    """Refuse unknown names of what is made only after the weights are loaded, which may take minutes."""
    for hook, name in (
        ("register_schedulers", config.engine.scheduler),
        ("register_executors", config.engine.executor),
        *(("register_drafters", name) for name in config.engine.drafter),
        ("register_tool_parsers", config.server.tool_parser),
        ("register_reasoning_parsers", config.server.reasoning_parser),
    ):
        if name is not None:
            plugins.registry(hook).entry(name)


def _default_checkpoint(config: Config, plugins: Plugins) -> DefaultCheckpoint | None:
    """That of the first plugin named with --plugin that has one."""
    if config.model.model is not None:
        return None
    defaults = (plugins.default_checkpoint(name) for name in config.plugins)
    default = next(filter(None, defaults), None)
    if default is None:
        raise ConfigError(
            "No model was named.", "Use --model with a folder, a .gguf file or a hub id, or try --plugin qwen."
        )
    return default


def _name(checkpoint: Checkpoint, default: DefaultCheckpoint | None) -> str:
    """Demo weights go by their own name, whatever file they lie in; a hub's default is a folder."""
    return default.demo.name if default and default.demo and checkpoint.path.is_file() else checkpoint.name


def _architecture(checkpoint: Checkpoint, plugins: Plugins) -> tuple[str, Architecture]:
    registry = plugins.registry("register_models")
    names = checkpoint.config.get("architectures")
    names = names if isinstance(names, list) else []
    name = next((name for name in names if name in registry), None)
    if name is None:
        raise CheckpointError(
            f"{checkpoint.name} is a {', '.join(map(str, names)) or 'model of no stated architecture'}, "
            "which no loaded plugin serves.",
            f"Served: {', '.join(sorted(registry))}.",
        )
    return registry.entry(name).plugin, registry.create(name)


def _device(name: str) -> str:
    if name != "auto":
        return name
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _dtype(config: Config, ops: Ops) -> torch.dtype:
    import torch

    name = config.model.dtype
    dtype: torch.dtype = ops.default_dtype() if name == "auto" else getattr(torch, name)
    return dtype


def _check_kv_cache(config: Config, attention: Attention, ops: Ops) -> None:
    """A backend that says nothing of storages, as a plugin may, keeps KV in the model's dtype alone."""
    wanted, possible = config.engine.kv_cache_quant, ("none", *getattr(attention, "kv_storages", ()))
    if wanted not in possible:
        raise ConfigError(
            f"--kv-cache-quant {wanted} is not possible with --attention {config.engine.attention} on {ops.name}.",
            f"Use {' or '.join(possible)}.",
        )


def _max_context(config: Config, model_config: ModelConfig, attention: Attention) -> int:
    asked, own, whose = config.model.max_model_len, model_config.max_context, "the model's own context"
    chunk = model_config.attention_chunk
    if chunk is not None and chunk < own and not getattr(attention, "chunked", False):
        own, whose = chunk, f"the one chunk that --attention {config.engine.attention} can do"
        log.warning("The context is limited to %s, of %d tokens.", whose, own)
    if asked is not None and asked > own:
        raise ConfigError(f"--max-model-len {asked} is beyond {whose} of {own}.", f"Use at most {own}.")
    return asked or own
