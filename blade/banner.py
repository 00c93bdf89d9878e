"""What blade says of itself at start: the model, the memory, the URL and something to paste."""

from __future__ import annotations

import shlex
from dataclasses import fields
from typing import TYPE_CHECKING

from blade.engine.memory import size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from blade.api.context import ServerContext
    from blade.assembly import Assembly
    from blade.config import Config
    from blade.engine.memory import MemoryPlan


def describe(assembly: Assembly, memory: MemoryPlan) -> list[str]:
    """Model, weights, device and memory, a line each."""
    checkpoint, engine = assembly.checkpoint, assembly.config.engine
    cache = "prefix cache on" if engine.prefix_cache else "prefix cache off"
    quant = "" if engine.kv_cache_quant == "none" else f" in {engine.kv_cache_quant}"
    return [
        f"model   {assembly.model_name}: {assembly.model_config.architecture} by plugin {assembly.family!r}, "
        f"{assembly.num_params / 1e6:,.0f} M parameters, {checkpoint.format}",
        f"weights {size(assembly.weight_bytes)}, {assembly.form.label}",
        f"device  {assembly.ops.name}, {str(assembly.dtype).removeprefix('torch.')}, "
        f"attention {engine.attention!r}, scheduler {engine.scheduler!r}, {cache}",
        *_speculation(assembly),
        f"memory  KV cache of {size(memory.num_bytes)}{quant}: {memory.num_tokens:,} tokens, "
        f"{memory.num_full_requests:.1f} requests of the full context of {memory.max_context:,}",
    ]


def _speculation(assembly: Assembly) -> list[str]:
    if not assembly.drafters:
        return []
    engine, draft = assembly.config.engine, assembly.draft
    how = "as many as pay" if engine.adaptive_drafts else "always"
    line = f"drafts  by {', '.join(map(repr, assembly.drafters))}, up to {engine.num_draft_tokens} tokens, {how}"
    if draft is not None:
        line += f"; draft model {draft.model_name}: {draft.num_params / 1e6:,.0f} M parameters, {draft.form.label}"
    return [line]


def ready(context: ServerContext, seconds: float) -> list[str]:
    """Where it can be reached, and a first request."""
    key = ' -H "Authorization: Bearer YOUR_KEY"' if context.api_keys else ""
    return [
        f"ready   in {seconds:.1f} s at {context.url}",
        "",
        f"curl -N {context.url}/v1/completions{key} -H 'Content-Type: application/json' \\",
        """     -d '{"prompt": "def fibonacci(n):", "max_tokens": 48, "temperature": 0, "stream": true}'""",
        "",
    ]


def command_line(config: Config) -> str:
    """The `blade serve` command that asks for the same; keys are left out."""
    words = ["blade", "serve"]
    for name in config.plugins:
        words += ["--plugin", name]
    for options, prefix in ((config.model, ""), (config.draft, "draft."), (config.engine, ""), (config.server, "")):
        words += _flags(options, prefix)
    return shlex.join(words)


def _flags(options: object, prefix: str) -> Iterator[str]:
    for field in fields(options):  # type: ignore[arg-type]
        value = getattr(options, field.name)
        if value == field.default or not field.repr:
            continue
        flag = prefix + field.name.replace("_", "-")
        if isinstance(value, bool):
            yield f"--{flag}" if value else f"--no-{flag}"
        elif isinstance(value, tuple):
            yield from (word for part in value for word in (f"--{flag}", str(part)))
        else:
            yield from (f"--{flag}", str(value))
