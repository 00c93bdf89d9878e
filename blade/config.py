"""What was asked for, as frozen structs. Flags become these once, in `blade.cli`; nothing later changes them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

Dtype = Literal["auto", "bfloat16", "float16", "float32"]
Dialect = Literal["bladellm", "openai"]
Hub = Literal["huggingface", "modelscope"]


class ModelOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Which model, and how to read it."""

    model: str | None = None  # a folder, a .gguf file or a hub id; None: the plugin's default checkpoint
    revision: str | None = None  # of a hub id; applies to every file
    hub: Hub = "huggingface"
    tokenizer_dir: Path | None = None
    chat_template: Path | None = None
    served_model_name: str | None = None
    dtype: Dtype = "auto"
    max_model_len: int | None = None  # tokens; None: the checkpoint's own


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Device, memory, policy."""

    device: str = "auto"
    attention: str = "paged"
    scheduler: str = "fcfs"
    executor: str = "local"
    drafter: str | None = None
    num_draft_tokens: int = 4
    max_batch_tokens: int = 2048
    max_num_seqs: int = 256
    block_size: int = 16
    prefix_cache: bool = True
    max_gpu_memory_utilization: float = 0.85
    kv_cache_memory: int | None = None  # bytes; None: from the memory that is free
    max_queue_time: float | None = None  # seconds; None: no bound
    max_queue_size: int = 1024  # sequences waiting
    threads: int | None = None  # None: all cores this process may use
    stall_seconds: float = 120.0  # a step longer than this makes /health false


class ServerOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The HTTP side."""

    host: str = "127.0.0.1"
    port: int = 8081
    dialect: Dialect = "bladellm"
    api_keys: tuple[str, ...] = ()
    insecure: bool = False
    drain_seconds: float = 30.0
    max_body_bytes: int = 4 << 20
    body_seconds: float = 30.0  # longest time a request body may take to arrive
    max_connections: int = 65535
    tool_parser: str | None = None
    reasoning_parser: str | None = None
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["text", "json"] = "text"
    access_log: bool = False


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """All of it."""

    plugins: tuple[str, ...] = ()
    model: ModelOptions = ModelOptions()
    engine: EngineConfig = EngineConfig()
    server: ServerOptions = ServerOptions()
