"""What route handlers are given: the running server (contracts.Server) and what the built-in routes need besides."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Any

from blade.api.adapters import AdapterTable
from blade.api.http import HTTPError
from blade.api.metrics import Metrics

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from blade.config import ServerOptions
    from blade.contracts import (
        EngineClient,
        LogitsProcessor,
        ReasoningParser,
        RouteHandler,
        Tokenizer,
        ToolParser,
    )
    from blade.text.chat_template import ChatTemplate
    from blade.types import RequestSummary


@dataclass(slots=True, kw_only=True)
class ServerContext:
    """Made once by the composition root. The parsers are the selected ones; factories make one object per choice."""

    engine: EngineClient
    tokenizer: Tokenizer
    model_name: str
    url: str
    version: str
    options: ServerOptions
    api_keys: tuple[str, ...] = ()  # none: everybody is let in
    chat_template: ChatTemplate | None = None  # None: chat requests are refused
    tool_parser: Callable[[Tokenizer], ToolParser] | None = None
    reasoning_parser: Callable[[Tokenizer], ReasoningParser] | None = None
    logits_processors: Mapping[str, Callable[[Any, Tokenizer], LogitsProcessor]] = field(default_factory=dict)
    routes: Mapping[str, RouteHandler] = field(default_factory=dict)  # plugins' own, beside the built-in ones
    request_finished: Callable[[RequestSummary], None] = lambda summary: None
    metrics: Metrics = field(default_factory=Metrics)
    started: int = field(default_factory=lambda: int(time.time()))  # seconds since the epoch
    seq_ids: Iterator[int] = field(default_factory=count)
    adapters: AdapterTable = field(default_factory=AdapterTable)

    def adapter_of(self, name: str | None) -> Any:
        """The LoRA adapter that a request's `model` names; None where it names the model itself, or nothing. Raises
        HTTPError 404 for any other name."""
        if not name or name == self.model_name:
            return None
        adapter = self.adapters.get(name)
        if adapter is None:
            served = " and ".join(map(repr, [self.model_name, *self.adapters][:8]))
            message = f"The model {name!r} is not served here; {served} {'are' if ' and ' in served else 'is'}."
            raise HTTPError(404, message, code="model_not_found", param="model")
        return adapter
