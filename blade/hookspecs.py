"""Every hook of blade, grouped by the moment it is called: the table of contents of what a plugin can add.

All `register_*` hooks have one shape: they get `register` and call ``register(name, factory)`` as often as they like.
A factory is called only when its name is selected, and imports heavy modules inside. Hooks run at start-up; the hot
path calls the plain objects that the factories return.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any

import pluggy

from blade.types import RequestSummary

if TYPE_CHECKING:
    from cyclopts import App

    from blade.contracts import Server

hookspec = pluggy.HookspecMarker("blade")
hookimpl = pluggy.HookimplMarker("blade")

Register = Callable[..., None]

# ---------------------------------------------------------------------------------------------- while the CLI is built


@hookspec
def register_commands(cli: App) -> None:
    """Add commands to `blade`; `cli` is a cyclopts App: ``cli.command(function, name="greet")``. A keyword parameter
    ``open_model: Annotated[Callable[..., OpenedModel], Parameter(parse=False)]`` is given a function: open_model(model,
    dtype="auto", device="auto", threads=None) -> contracts.OpenedModel, with the plugins that were named."""


# ---------------------------------------------------------------------- while the server is put together


@hookspec
def register_models(register: Register) -> None:
    """``register(architecture, factory, default=None)``: factory() -> contracts.Architecture, or of a head that drafts
    contracts.HeadArchitecture, selected by the checkpoint's `architectures`. `default` is a blade.DefaultCheckpoint:
    the model that ``--plugin NAME`` serves when no ``--model`` is given; at most one per plugin."""


@hookspec
def register_quantizations(register: Register) -> None:
    """``register(method, factory, plain=False)``: factory(quantization_config: dict) -> contracts.Quantization,
    selected by the checkpoint's `quantization_config.quant_method`. With ``plain=True`` it makes its format of plain
    weights instead: it is selected by ``--quantize`` alone, and the factory is given {}."""


@hookspec
def register_backends(register: Register) -> None:
    """``register(name, factory)``: factory(threads: int | None) -> contracts.Ops, selected by ``--device``. Where the
    factory has a method `prepare(num_bytes: int)`, a server calls it before it imports torch, with about as many bytes
    as its weights will take: a hint, after which the factory is called as ever."""


@hookspec
def register_attention(register: Register) -> None:
    """``register(name, factory)``: factory(ops: contracts.Ops) -> contracts.Attention, selected by ``--attention``."""


@hookspec
def register_schedulers(register: Register) -> None:
    """``register(name, factory)``: factory(blocks: contracts.Blocks, config: EngineConfig) -> contracts.Scheduler,
    selected by ``--scheduler``."""


@hookspec
def register_drafters(register: Register) -> None:
    """``register(name, factory)``: factory(config: EngineConfig, draft_model: contracts.DraftModel |
    contracts.DraftHead | None) -> contracts.Drafter, selected by ``--drafter``. `draft_model` is that of
    ``--draft.model``, where one was named.

    A factory that cannot do without one may have an attribute `draft_architectures: tuple[str, ...]`: the registered
    architectures that ``--draft.model`` may have, the first of them where its config.json names none. One that drafts
    with heads out of the model's own checkpoint has an attribute `head`: head(config.json's content: Mapping, weights:
    contracts.Weights) -> contracts.HeadArchitecture, raising CheckpointError where there are none. That of a
    contracts.TreeDrafter has an attribute `trees`, True. A factory that refuses some options may have an attribute
    `check_options`: check_options(config: EngineConfig) -> None, called before anything is loaded, raising
    ConfigError."""


@hookspec
def register_executors(register: Register) -> None:
    """``register(name, factory)``: factory(make_runner: Callable[[], contracts.Runner], config: EngineConfig) ->
    contracts.Executor, selected by ``--executor``."""


@hookspec
def register_logits_processors(register: Register) -> None:
    """``register(name, factory)``: factory(arguments: Any, tokenizer: contracts.Tokenizer) ->
    contracts.LogitsProcessor, selected by the request field `logits_processors`: ``{name: arguments}``."""


@hookspec
def register_tool_parsers(register: Register) -> None:
    """``register(name, factory)``: factory(tokenizer: contracts.Tokenizer) -> contracts.ToolParser, selected by
    ``--tool-parser``."""


@hookspec
def register_reasoning_parsers(register: Register) -> None:
    """``register(name, factory)``: factory(tokenizer: contracts.Tokenizer) -> contracts.ReasoningParser, selected by
    ``--reasoning-parser``."""


@hookspec
def register_routes(register: Register) -> None:
    """``register("METHOD /path", handler)``: async handler(server: contracts.Server, request: contracts.Request) ->
    contracts.Response. Routes need the API key like all others."""


# ---------------------------------------------------------------------------------------------- while the server runs


@hookspec
def lifespan(server: Server) -> AbstractAsyncContextManager[Any] | None:
    """An async context manager entered when the server is ready and left when it stops."""


@hookspec
def request_finished(summary: RequestSummary) -> None:
    """Called on the loop thread after each generation request, however it ended. Return quickly."""
