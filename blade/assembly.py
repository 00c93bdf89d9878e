"""From a Config to an engine: choose every part by name, load the weights, size the KV cache."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from blade.errors import CheckpointError, ConfigError
from blade.types import CaptureOptions, KVSpec, Limits

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from blade.checkpoint.open import Checkpoint
    from blade.config import Config
    from blade.contracts import Architecture, Attention, Drafter, Model, Ops
    from blade.engine.engine import Engine
    from blade.engine.memory import MemoryPlan
    from blade.plugins import Plugins
    from blade.quantization import WeightForm
    from blade.registry import Registry
    from blade.types import DefaultCheckpoint, ModelConfig


@dataclass(frozen=True)
class Assembly:
    """Everything chosen, nothing heavy loaded yet."""

    config: Config
    plugins: Plugins
    checkpoint: Checkpoint
    architecture: Architecture
    family: str  # the plugin that brought the architecture
    form: WeightForm
    model_config: ModelConfig
    model_name: str
    max_context: int  # tokens
    ops: Ops
    attention: Attention
    dtype: torch.dtype

    @property
    def kv_spec(self) -> KVSpec:
        model = self.model_config
        return KVSpec(
            num_layers=model.num_layers,
            num_heads=model.num_heads,
            num_kv_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            dtype=str(self.dtype).removeprefix("torch."),
            block_size=self.config.engine.block_size,
        )

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights once loaded; a tied embedding counts once."""
        from blade.nn.tensors import loaded_bytes

        weights, quantization = self.checkpoint.weights, self.form.quantization
        return sum(loaded_bytes(name, weights, self.ops, self.dtype, quantization) for name in weights.names())

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
        block_bytes = self.attention.block_bytes(self.kv_spec)
        on_cpu = self.ops.device.type == "cpu"
        return plan_memory(self.config.engine, available, block_bytes, self.max_context, on_cpu)


def choose(config: Config, plugins: Plugins, to_load: bool = False) -> Assembly:
    """Resolve every name of the config; with `to_load`, the weights are about to be loaded. Raises ConfigError,
    PluginError or CheckpointError with a remedy."""
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
    ops: Ops = backends.create(_device(config.engine.device), config.engine.threads)
    dtype = _dtype(config, ops)
    return Assembly(
        config=config,
        plugins=plugins,
        checkpoint=checkpoint,
        architecture=architecture,
        family=family,
        form=choose_form(checkpoint, config.model.quantize, ops, dtype, plugins),
        model_config=model_config,
        model_name=config.model.served_model_name or _name(checkpoint, default),
        max_context=_max_context(config, model_config),
        ops=ops,
        attention=plugins.registry("register_attention").create(config.engine.attention, ops),
        dtype=dtype,
    )


def load_model(assembly: Assembly, advance: Callable[[int], None] | None = None) -> Model:
    """Load the weights; `advance` is told the bytes of each tensor once it is in."""
    from blade.nn import Loader

    weights, quantization = assembly.checkpoint.weights, assembly.form.quantization
    loader = Loader(weights, assembly.ops, assembly.attention, assembly.dtype, quantization, advance)
    return assembly.architecture.build(replace(assembly.model_config, max_context=assembly.max_context), loader)


def build_engine(assembly: Assembly, model: Model, memory: MemoryPlan) -> Engine:
    """Allocate the KV cache and put the engine together; it is not started."""
    from blade.engine.blocks import BlockPool
    from blade.engine.engine import Engine
    from blade.engine.runner import ModelRunner

    plugins, config = assembly.plugins, assembly.config.engine
    kv = assembly.attention.allocate(assembly.kv_spec, memory.num_blocks)
    executor = plugins.registry("register_executors").create(
        config.executor, lambda: ModelRunner(model, kv, assembly.ops, assembly.capture), config
    )
    blocks = BlockPool(memory.num_blocks, config.block_size, config.prefix_cache)
    scheduler = plugins.registry("register_schedulers").create(config.scheduler, blocks, config)
    drafter: Drafter | None = None
    if config.drafter is not None:
        drafter = plugins.registry("register_drafters").create(config.drafter, config)
    limits = Limits(assembly.model_config.vocab_size, assembly.max_context, config.max_num_seqs)
    return Engine(executor, scheduler, blocks, config, limits, drafter)


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
        ("register_drafters", config.engine.drafter),
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


def _max_context(config: Config, model_config: ModelConfig) -> int:
    asked = config.model.max_model_len
    if asked is not None and asked > model_config.max_context:
        raise ConfigError(
            f"--max-model-len {asked} is beyond the model's own context of {model_config.max_context}.",
            f"Use at most {model_config.max_context}.",
        )
    return asked or model_config.max_context
