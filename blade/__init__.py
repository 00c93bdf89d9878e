"""blade: an LLM inference server whose every part is a plugin.

This module is the whole public surface: a plugin imports from here, from `blade.nn`, for the types of what it writes
from `blade.contracts`, in its tests from `blade.testing`, and from nowhere else. Importing it is cheap (no torch).
"""

from blade.api.http import EventStream, JSONResponse, TextResponse
from blade.config import Config, DraftOptions, EngineConfig, ModelOptions, ServerOptions
from blade.engine.head_drafter import HeadDrafter
from blade.engine.scheduler import OrderedScheduler
from blade.errors import BladeError, CheckpointError, ConfigError, Overloaded, PluginError, RequestError
from blade.hookspecs import hookimpl
from blade.types import (
    Batch,
    CaptureOptions,
    DefaultCheckpoint,
    DemoWeights,
    Draft,
    DrafterStats,
    DualChunks,
    EngineStats,
    FinishReason,
    Float8Weight,
    GGMLBlocks,
    GroupedWeight,
    KeySelection,
    KVCache,
    KVSpec,
    Limits,
    ModelConfig,
    Output,
    QuantizedWeight,
    RequestSummary,
    Sampled,
    SamplingParams,
    Sequence,
    StateSpec,
    StateTensor,
    Step,
    TokenLogprob,
)

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "BladeError",
    "CaptureOptions",
    "CheckpointError",
    "Config",
    "ConfigError",
    "DefaultCheckpoint",
    "DemoWeights",
    "Draft",
    "DraftOptions",
    "DrafterStats",
    "DualChunks",
    "EngineConfig",
    "EngineStats",
    "EventStream",
    "FinishReason",
    "Float8Weight",
    "GGMLBlocks",
    "GroupedWeight",
    "HeadDrafter",
    "JSONResponse",
    "KVCache",
    "KVSpec",
    "KeySelection",
    "Limits",
    "ModelConfig",
    "ModelOptions",
    "OrderedScheduler",
    "Output",
    "Overloaded",
    "PluginError",
    "QuantizedWeight",
    "RequestError",
    "RequestSummary",
    "Sampled",
    "SamplingParams",
    "Sequence",
    "ServerOptions",
    "StateSpec",
    "StateTensor",
    "Step",
    "TextResponse",
    "TokenLogprob",
    "hookimpl",
]
