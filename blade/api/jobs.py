"""From a request's body to a job: everything checked, every prompt in ids, nothing left to refuse but by the engine."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from blade.api import params
from blade.api.prompts import chat_prompt, check_count, completion_prompts, echoed, predicted, uses_tools
from blade.api.wire import ChatRequest, CompletionRequest, Sampling, decode
from blade.errors import RequestError
from blade.types import Sequence

if TYPE_CHECKING:
    from blade.api.context import ServerContext
    from blade.api.http import HTTPRequest
    from blade.types import SamplingParams

DEFAULT_COMPLETION_TOKENS = 16


@dataclass(slots=True, kw_only=True)
class Job:
    """What one request wants of the engine, the same for both endpoints. Choice i of prompt p is seqs[p * n + i]."""

    id: str
    endpoint: str
    chat: bool
    continues: bool  # the reply goes on from a text, rather than beginning one
    model: str  # as the request names it
    served_model: str  # the model, or one of its adapters
    stream: bool
    include_usage: bool
    logprobs: bool
    n: int
    stop: list[str]
    tools: bool
    seqs: list[Sequence]
    arrival: float  # seconds, monotonic clock
    echo: list[str] = field(default_factory=list)  # one text per prompt, or none

    @property
    def prompts(self) -> list[list[int]]:
        return [seq.prompt_ids for seq in self.seqs[:: self.n]]


async def completion_job(server: ServerContext, http: HTTPRequest) -> Job:
    """Raises RequestError naming the field that cannot be honoured, HTTPError for another model."""
    body = await http.body()
    arrival = time.monotonic()
    request = decode(body, CompletionRequest)
    adapter = server.adapter_of(request.model)
    num_logprobs = params.completion_logprobs(request)
    if request.echo and num_logprobs is not None:
        raise RequestError("echo together with logprobs is not supported by this version.", param="echo")
    limits, tokenizer = server.engine.limits, server.tokenizer
    sampling = params.sampling_params(request, limits, tokenizer.eos_token_ids, num_logprobs)
    prompts = await completion_prompts(request, tokenizer, limits)
    job = _job(server, http, request, sampling, prompts, adapter, arrival)
    job.echo = await echoed(request, prompts, tokenizer)
    return job


async def chat_job(server: ServerContext, http: HTTPRequest) -> Job:
    """As completion_job."""
    body = await http.body()
    arrival = time.monotonic()
    request = decode(body, ChatRequest)
    adapter = server.adapter_of(request.model)
    num_logprobs = params.chat_logprobs(request)
    limits, tokenizer = server.engine.limits, server.tokenizer
    sampling = params.sampling_params(request, limits, tokenizer.eos_token_ids, num_logprobs)
    check_count(1, request.n or 1, "messages", limits)
    prompt = await chat_prompt(request, server.chat_template, tokenizer, server.tool_parser is not None)
    prediction = await predicted(request, tokenizer, limits.max_context)
    job = _job(server, http, request, sampling, [prompt], adapter, arrival)
    for seq in job.seqs:
        seq.prediction_ids = prediction
    return job


def _job(
    server: ServerContext,
    http: HTTPRequest,
    request: Sampling,
    sampling: SamplingParams,
    prompts: list[list[int]],
    adapter: Any,
    arrival: float,
) -> Job:
    chat = isinstance(request, ChatRequest)
    seqs = _sequences(server, request, sampling, prompts, _namespace(http.tenant, request.cache_salt, adapter), arrival)
    for seq in seqs:
        seq.adapter = adapter
    return Job(
        id=http.id,
        endpoint=http.path,
        chat=chat,
        continues=not isinstance(request, ChatRequest) or bool(request.resume_response),
        model=request.model or "",
        served_model=server.model_name if adapter is None else adapter.name,
        stream=bool(request.stream),
        include_usage=bool(request.stream_options and request.stream_options.include_usage),
        logprobs=sampling.logprobs is not None,
        n=request.n or 1,
        stop=params.stop_strings(request),
        tools=isinstance(request, ChatRequest) and uses_tools(request),
        seqs=seqs,
        arrival=arrival,
    )


def _sequences(
    server: ServerContext,
    request: Sampling,
    sampling: SamplingParams,
    prompts: list[list[int]],
    namespace: bytes,
    arrival: float,
) -> list[Sequence]:
    """n for each prompt, every one checked against the engine's limits."""
    chat, n, limits = isinstance(request, ChatRequest), request.n or 1, server.engine.limits
    name = "messages" if chat else "prompt"
    params.check_num_logprobs(request, len(prompts), sampling.logprobs)
    params.check_processors(request, server.logits_processors)
    seqs: list[Sequence] = []
    for prompt in prompts:
        default = None if chat else DEFAULT_COMPLETION_TOKENS
        max_tokens = params.resolve_max_tokens(request, len(prompt), default, limits, name)
        params.check_ids(prompt, name, limits)
        for i in range(n):
            processors = params.make_processors(request, server.logits_processors, server.tokenizer)
            seqs.append(
                Sequence(
                    id=next(server.seq_ids),
                    prompt_ids=prompt,
                    params=params.for_choice(sampling, max_tokens, i, request.seed, processors),
                    index=len(seqs),
                    namespace=namespace,
                    priority=request.priority or 0,
                    arrival=arrival,
                )
            )
    return seqs


def _namespace(tenant: bytes, salt: str | None, adapter: Any) -> bytes:
    """The prefix-cache namespace: prefixes are shared within one API key, one `cache_salt` and one adapter only."""
    if not (tenant or salt or adapter):
        return b""
    person = adapter.namespace if adapter else b""
    return blake2b((salt or "").encode(), key=tenant, person=person, digest_size=16).digest()
