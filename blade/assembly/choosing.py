"""From a Config to an Assembly: every part is chosen by name, and names that nothing answers to are refused."""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from blade.assembly.chosen import DRAFT_MODEL, Assembly
from blade.config import ModelOptions
from blade.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from blade.checkpoint.open import Checkpoint
    from blade.config import Config
    from blade.contracts import (
        Architecture,
        Attention,
        HeadArchitecture,
        Ops,
        Weights,
    )
    from blade.plugins import Plugins
    from blade.registry import Registry
    from blade.types import DefaultCheckpoint, ModelConfig

log = logging.getLogger("blade.assembly")


def choose(config: Config, plugins: Plugins, to_load: bool = False) -> Assembly:
    """Resolve every name of the config; with `to_load`, the weights are about to be loaded. Raises ConfigError,
    PluginError or CheckpointError with a remedy."""
    assembly = _choose(config, plugins, to_load)
    draft = _choose_draft(config, plugins, assembly)
    if draft is None:
        return assembly
    return replace(assembly, draft=replace(draft, max_context=min(draft.max_context, assembly.max_context)))


def _choose_draft(config: Config, plugins: Plugins, target: Assembly) -> Assembly | None:
    """What --draft.model names, or heads that a drafter asks for: there, or in the target's own checkpoint."""
    names = config.engine.drafter
    registry: Any = plugins.registry("register_drafters")
    own = next((name for name in names if hasattr(registry[name], "head")), None)
    wanting = [name for name in names if name == DRAFT_MODEL or hasattr(registry[name], "draft_architectures")]
    if config.draft.model is None:
        if wanting:
            raise ConfigError(f"--drafter {wanting[0]} has no model to draft with.", "Name one with --draft.model.")
        return _own_head(target, registry[own]) if own else None
    options = {field.name: getattr(config.draft, field.name) for field in fields(config.draft)}
    if own:
        if wanting:
            raise ConfigError(
                f"--drafter {own} and --drafter {wanting[0]} would both draft with --draft.model.",
                "Leave one of them out.",
            )
        return _own_head(_holder_of_heads(config, plugins, target, options), registry[own])
    kinds = next((registry[name].draft_architectures for name in wanting if name != DRAFT_MODEL), ())
    draft = _choose(replace(config, model=ModelOptions(**options)), plugins, target=target, kinds=kinds)
    if other := next((name for name in wanting if name != draft.drafter), None):
        raise ConfigError(
            f"--draft.model {draft.model_name} is for --drafter {draft.drafter}, not for --drafter {other}.",
            f"Leave --drafter {other} out.",
        )
    if draft.model_config.state is not None:
        heads = own_heads(draft)
        remedy = f"add --drafter {heads.drafter}, which drafts with its heads" if heads else "use --drafter suffix"
        raise ConfigError(
            f"--draft.model {draft.model_name} has recurrent layers, which cannot take back what they drafted.",
            f"Choose a draft model with attention alone, or {remedy}.",
        )
    return draft


def _choose(
    config: Config,
    plugins: Plugins,
    to_load: bool = False,
    target: Assembly | None = None,
    kinds: tuple[str, ...] = (),
) -> Assembly:
    """`target`: the model that this one drafts for. `kinds`: what its architecture may be; the first, where its
    config.json says none of them."""
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
    family, architecture = _architecture(checkpoint, plugins, kinds)
    weights = _seen(architecture, checkpoint.config, checkpoint.weights)
    model_config = _configure(checkpoint, architecture, target)
    device, threads = _device(config.engine.device), config.engine.threads
    ops: Ops = target.ops if target else backends.create(device, threads)
    dtype = _dtype(config, ops, target if hasattr(architecture, "drafter") else None)
    make_attention = plugins.registry("register_attention").create
    attention: Attention = target.attention if target else make_attention(config.engine.attention, ops)
    _check_kv_cache(config, attention, ops)
    _check_trees(config, plugins, attention, ops, model_config)
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


def _holder_of_heads(config: Config, plugins: Plugins, target: Assembly, options: dict[str, Any]) -> Assembly:
    """The target with the files that --draft.model names in place of its own: quantised forms of a model often leave
    its heads out, and GGUF files may have them apart."""
    dtype = _dtype(replace(config, model=ModelOptions(**options)), target.ops, target)
    model = ModelOptions(**options | {"dtype": str(dtype).removeprefix("torch.")})
    found = _choose(replace(config, model=model), plugins, target=target)
    return replace(target, checkpoint=found.checkpoint, form=found.form, model_name=found.model_name)


def own_heads(assembly: Assembly) -> Assembly | None:
    """The heads in a model's checkpoint that a drafter could draft with, where there are any."""
    registry: Any = assembly.plugins.registry("register_drafters")
    for name in registry:
        if hasattr(registry[name], "head"):
            with suppress(CheckpointError):  # this one finds none
                return _own_head(assembly, registry[name])
    return None


def _own_head(target: Assembly, factory: Any) -> Assembly:
    """A head out of the target's checkpoint."""
    config, stored = target.checkpoint.config, target.checkpoint.weights
    architecture: HeadArchitecture = factory.head(config, stored)
    return replace(
        target,
        architecture=architecture,
        weights=_seen(architecture, config, stored),
        model_config=architecture.configure(config, target.model_config),
        model_name=f"{target.model_name}'s own",
        draft=None,
    )


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
    """Refuse unknown names of what is made only after the weights are loaded, which may take minutes, and options that
    a drafter would then refuse."""
    for hook, name in (
        ("register_schedulers", config.engine.scheduler),
        ("register_executors", config.engine.executor),
        *(("register_drafters", name) for name in config.engine.drafter),
        ("register_tool_parsers", config.server.tool_parser),
        ("register_reasoning_parsers", config.server.reasoning_parser),
    ):
        if name is not None:
            plugins.registry(hook).entry(name)
    for name in config.engine.drafter:
        check = getattr(plugins.registry("register_drafters")[name], "check_options", None)
        if check is not None:
            check(config.engine)


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


def _architecture(
    checkpoint: Checkpoint, plugins: Plugins, kinds: tuple[str, ...]
) -> tuple[str, Architecture | HeadArchitecture]:
    registry = plugins.registry("register_models")
    names = checkpoint.config.get("architectures")
    names = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    if kinds and not any(name in kinds for name in names):
        names = [kinds[0]]
    name = next((name for name in names if name in registry), None)
    if name is None:
        served = sorted(name for name in registry if not hasattr(registry.create(name), "drafter"))
        raise CheckpointError(
            f"{checkpoint.name} is a {', '.join(names)[:200] or 'model of no stated architecture'}, "
            "which no loaded plugin serves.",
            f"Served: {', '.join(served)}.",
        )
    return registry.entry(name).plugin, registry.create(name)


def _configure(
    checkpoint: Checkpoint, architecture: Architecture | HeadArchitecture, target: Assembly | None
) -> ModelConfig:
    if not hasattr(architecture, "drafter"):
        return architecture.configure(checkpoint.config)
    if target is None:
        raise CheckpointError(
            f"{checkpoint.name} is a head that drafts for another model, and none by itself.",
            f"Name that model with --model, and this with --draft.model (--drafter {architecture.drafter}).",
        )
    return cast("HeadArchitecture", architecture).configure(checkpoint.config, target.model_config)


def _seen(architecture: Architecture | HeadArchitecture, config: Mapping[str, Any], weights: Weights) -> Weights:
    """The checkpoint's tensors as the architecture is to see them."""
    adapt = getattr(architecture, "weights", None)
    seen: Weights = adapt(config, weights) if adapt else weights
    return seen


def _device(name: str) -> str:
    if name != "auto":
        return name
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _dtype(config: Config, ops: Ops, target: Assembly | None) -> torch.dtype:
    """`target`: the model that a head goes on from, in whose dtype it runs."""
    import torch

    name = config.model.dtype
    if target is not None:
        if name not in ("auto", str(target.dtype).removeprefix("torch.")):
            raise ConfigError(f"--draft.dtype {name}: a head runs in the dtype of the model, {target.dtype}.")
        return target.dtype
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


def _check_trees(config: Config, plugins: Plugins, attention: Attention, ops: Ops, model_config: ModelConfig) -> None:
    """Drafts that are trees need an attention that knows them, and no state that has but one past."""
    registry: Any = plugins.registry("register_drafters")
    drafter = next((name for name in config.engine.drafter if getattr(registry[name], "trees", False)), None)
    if drafter is None:
        return
    who = f"--drafter {drafter} drafts trees, which"
    if model_config.state is not None:
        raise ConfigError(
            f"{who} the recurrent layers of {model_config.architecture} cannot follow.",
            "Choose another drafter, such as suffix.",
        )
    if not getattr(attention, "trees", False):
        raise ConfigError(
            f"{who} --attention {config.engine.attention} cannot verify on {ops.name}.",
            "Choose another drafter, such as suffix.",
        )


def _max_context(config: Config, model_config: ModelConfig, attention: Attention) -> int:
    asked, own, whose = config.model.max_model_len, model_config.max_context, "the model's own context"
    limit, what = _limited(model_config, attention)
    if limit is not None and limit < own:
        own, whose = limit, f"{what} that --attention {config.engine.attention} can do"
        log.warning("The context is limited to %s, of %d tokens.", whose, own)
    if asked is not None and asked > own:
        raise ConfigError(f"--max-model-len {asked} is beyond {whose} of {own}.", f"Use at most {own}.")
    return asked or own


def _limited(model_config: ModelConfig, attention: Attention) -> tuple[int | None, str]:
    """Tokens that are all the attention can do of this model, and what they are; None: it can do all."""
    dual, selection = model_config.dual_chunks, model_config.key_selection
    if selection is not None and not hasattr(attention, "attend_slots"):
        return selection.most_keys, "the attention to all keys"
    if dual is not None and not hasattr(attention, "attend_dual_chunks"):
        return dual.num_undivided, "the one chunk"
    return None if getattr(attention, "chunked", False) else model_config.attention_chunk, "the one chunk"
