"""Protocols of two to four methods over the nouns of `blade.types`: all that the parts of blade know of each other.

An object fits by having the methods; nothing needs to inherit. `blade.testing` has a `check_*` kit for most of them.
"""

from blade.contracts.devices import (
    Attention,
    BegunStep,
    DraftRunner,
    DualChunkAttention,
    Executor,
    Ops,
    Overlapping,
    Runner,
    SlotAttention,
)
from blade.contracts.heads import (
    NORMED,
    DraftHead,
    Head,
    HeadArchitecture,
    HeadRunner,
    HiddenReader,
    ReadableModel,
)
from blade.contracts.models import Architecture, Experts, Linear, Loader, Model, Quantization, Weights
from blade.contracts.opened import OpenedModel
from blade.contracts.policies import Blocks, Drafter, DraftModel, LogitsProcessor, Scheduler, TreeDrafter
from blade.contracts.server import EngineClient, Request, Response, RouteHandler, Server, Stream
from blade.contracts.text import ReasoningParser, Tokenizer, ToolParser

__all__ = [
    "NORMED",
    "Architecture",
    "Attention",
    "BegunStep",
    "Blocks",
    "DraftHead",
    "DraftModel",
    "DraftRunner",
    "Drafter",
    "DualChunkAttention",
    "EngineClient",
    "Executor",
    "Experts",
    "Head",
    "HeadArchitecture",
    "HeadRunner",
    "HiddenReader",
    "Linear",
    "Loader",
    "LogitsProcessor",
    "Model",
    "OpenedModel",
    "Ops",
    "Overlapping",
    "Quantization",
    "ReadableModel",
    "ReasoningParser",
    "Request",
    "Response",
    "RouteHandler",
    "Runner",
    "Scheduler",
    "Server",
    "SlotAttention",
    "Stream",
    "Tokenizer",
    "ToolParser",
    "TreeDrafter",
    "Weights",
]
