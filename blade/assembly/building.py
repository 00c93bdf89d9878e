"""From an Assembly to an engine: load the weights, allocate the KV cache, put the parts together."""

from __future__ import annotations

import secrets
from dataclasses import replace
from typing import TYPE_CHECKING, cast

from blade.assembly.shapes import explained
from blade.errors import ConfigError
from blade.types import Limits

if TYPE_CHECKING:
    from collections.abc import Callable

    from blade.assembly.chosen import Assembly
    from blade.contracts import Architecture, DraftHead, DraftModel, Executor, Head, Model, ReadableModel
    from blade.engine.blocks import BlockPool
    from blade.engine.drafting import GuardedDrafter
    from blade.engine.engine import Engine
    from blade.engine.hidden import HiddenStates
    from blade.engine.memory import MemoryPlan
    from blade.engine.speculation import Speculator
    from blade.nn.lora import Adapters


def load_model(
    assembly: Assembly, advance: Callable[[int], None] | None = None, adapters: Adapters | None = None
) -> Model:
    """Load the weights; `advance` is told the bytes of each tensor once it is in, `adapters` what they may change."""
    from blade.nn import Loader

    weights, quantization = assembly.weights, assembly.form.quantization
    loader = Loader(weights, assembly.ops, assembly.attention, assembly.dtype, quantization, advance, adapters)
    config = replace(assembly.model_config, max_context=assembly.max_context)
    with explained(assembly):
        model: Model = cast("Architecture", assembly.architecture).build(config, loader)
    return model


def load_draft(assembly: Assembly, target: Model, advance: Callable[[int], None] | None = None) -> Model | Head | None:
    """Of the same assembly, whose model is `target`."""
    from blade.nn import Loader

    draft = assembly.draft
    if draft is None:
        return None
    if draft.head is None:
        return load_model(draft, advance)
    if not hasattr(target, "show_hidden"):
        raise ConfigError(
            f"--drafter {draft.drafter} reads hidden states, which {target.config.architecture} does not show.",
            "Choose another drafter, such as suffix.",
        )
    loader = Loader(draft.weights, draft.ops, draft.attention, draft.dtype, draft.form.quantization, advance)
    config = replace(draft.model_config, max_context=draft.max_context)
    return draft.head.build(config, loader, cast("ReadableModel", target))


def make_adapters(assembly: Assembly) -> Adapters | None:
    """For `load_model`; None where none were asked for, so that linears are called without a detour."""
    from blade.nn.lora import Adapters

    options = assembly.config.model
    return Adapters(assembly.ops, assembly.dtype) if options.lora or options.lora_dir else None


def build_engine(
    assembly: Assembly,
    model: Model,
    memory: MemoryPlan,
    draft: Model | Head | None = None,
    adapters: Adapters | None = None,
) -> Engine:
    """Allocate the KV cache and put the engine together; it is not started. `draft`: what `load_draft` gave;
    `adapters`: those that the model was loaded with."""
    from blade.engine.blocks import BlockPool
    from blade.engine.engine import Engine
    from blade.engine.runner import ModelRunner
    from blade.engine.state_cache import with_index_keys, with_states
    from blade.engine.states import PER_SEQUENCE, StatePool

    plugins, config = assembly.plugins, assembly.config.engine
    states = StatePool(memory.num_states) if memory.num_states else None
    if states is not None:
        config = replace(config, max_num_seqs=min(config.max_num_seqs, memory.num_states // PER_SEQUENCE))
    secret = secrets.randbits(64)
    model_config, placed = assembly.model_config, (assembly.dtype, assembly.ops.device)
    kv = assembly.attention.allocate(assembly.kv_spec, memory.num_blocks)
    kv = with_index_keys(kv, model_config, config.block_size, memory.num_blocks, *placed)
    kv = with_states(kv, model_config, memory.num_states, *placed)
    drafters = _drafters(assembly, draft, memory, secret)
    hidden = _hidden(assembly, model, drafters)
    tree_drafters = [drafter for drafter in drafters if drafter.tree_size]
    executor = plugins.registry("register_executors").create(
        config.executor,
        lambda: ModelRunner(model, kv, assembly.ops, assembly.capture, secret, adapters, hidden, tree_drafters),
        config,
    )
    blocks = BlockPool(memory.num_blocks, config.block_size, config.prefix_cache, states)
    scheduler = plugins.registry("register_schedulers").create(config.scheduler, blocks, config)
    limits = Limits(model_config.vocab_size, assembly.max_context, config.max_num_seqs)
    speculator = _speculator(assembly, executor, blocks, limits, drafters, hidden) if drafters else None
    return Engine(executor, scheduler, blocks, config, limits, speculator)


def _drafters(assembly: Assembly, draft: Model | Head | None, memory: MemoryPlan, secret: int) -> list[GuardedDrafter]:
    from blade.engine.drafting import GuardedDrafter

    registry, vocab_size = assembly.plugins.registry("register_drafters"), assembly.model_config.vocab_size
    draft_model = _draft_model(assembly.draft, draft, memory, secret) if assembly.draft and draft else None
    return [
        GuardedDrafter(name, registry.create(name, assembly.config.engine, draft_model), vocab_size)
        for name in assembly.drafters
    ]


def _draft_model(assembly: Assembly, model: Model | Head, memory: MemoryPlan, secret: int) -> DraftModel | DraftHead:
    from blade.contracts import DraftHead, DraftModel
    from blade.engine.blocks import BlockPool
    from blade.engine.head_runner import HeadRunner
    from blade.engine.runner import ModelRunner

    config = assembly.config.engine
    kv = assembly.attention.allocate(assembly.kv_spec, memory.num_blocks)
    blocks = BlockPool(memory.num_blocks, config.block_size, config.prefix_cache)
    rest = kv, assembly.ops, assembly.capture, secret
    if assembly.head:
        runner = HeadRunner(cast("Head", model), *rest, config.max_batch_tokens)
        return DraftHead(runner, blocks, assembly.max_context)
    return DraftModel(ModelRunner(cast("Model", model), *rest), blocks, assembly.max_context)


def _hidden(assembly: Assembly, model: Model, drafters: list[GuardedDrafter]) -> HiddenStates | None:
    """What the model is to show, where a drafter reads it."""
    from blade.engine.hidden import HiddenStates

    readers = [drafter for drafter in drafters if drafter.hidden_states]
    if not readers:
        return None
    return HiddenStates(model, readers, assembly.config.engine.max_batch_tokens, assembly.dtype, assembly.ops.device)


def _speculator(
    assembly: Assembly,
    executor: Executor,
    blocks: BlockPool,
    limits: Limits,
    drafters: list[GuardedDrafter],
    hidden: HiddenStates | None,
) -> Speculator:
    """With the cost of steps measured, where drafts are to be adapted to it."""
    from blade.engine.costs import StepCosts
    from blade.engine.speculation import Speculator
    from blade.engine.warm_up import measure_costs, rehearse

    config, costs = assembly.config.engine, None
    if config.adaptive_drafts:
        costs = StepCosts(*measure_costs(executor, blocks, limits, config.max_batch_tokens))
        for drafter in drafters:
            rehearse(drafter, drafter.tree_size or config.num_draft_tokens, limits.vocab_size, hidden)
    return Speculator(drafters, costs, config.num_draft_tokens, limits.max_context)
