"""An engine that plays a script, a tokenizer of bytes, and a client: the app without model or socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeVar

from blade.api.app import App
from blade.api.context import ServerContext
from blade.config import ServerOptions
from blade.engine.stream import OutputStream
from blade.types import EngineStats, Limits, Output, RequestSummary, Sampled, Sequence, TokenLogprob

from .rsgi import Answer, FakeHeaders, FakeProto, FakeScope

EOS = 256
T = TypeVar("T")


class ByteTokenizer:
    """Ids are bytes; 256 ends a text and 257 is another control token."""

    eos_token_ids = (EOS,)
    vocab_size = 258
    control_tokens: Mapping[str, int] = MappingProxyType({"<eos>": EOS})

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def encode_template(self, text: str, literals: Mapping[str, str] | None = None) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Seq[int], skip_special_tokens: bool = True) -> str:
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < EOS else b""


class FakeTemplate:
    """Renders `role:content|` and remembers what it was given."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def render_ids(self, tokenizer: Any, messages: list[dict[str, Any]], **kwargs: Any) -> list[int]:
        self.calls.append({"messages": messages, **kwargs})
        return tokenizer.encode_template("".join(f"{m['role']}:{m['content']}|" for m in messages))


@dataclass
class FakeEngine:
    """contracts.EngineClient. Every sequence says `say`, a byte per token, then EOS, and begins again if it may."""

    say: str = "Hello"
    limits: Limits = field(default_factory=lambda: Limits(vocab_size=260, max_context=512, max_num_seqs=32))
    gate: asyncio.Event | None = None  # no step before it is set
    pace: float = 0.0  # seconds per step
    refuse: Exception | None = None  # raised by submit
    fail_at: int | None = None  # the step at which each sequence ends with `error`
    error: Exception = field(default_factory=lambda: RuntimeError("secret path /home/x"))
    draining: bool = False  # the next step ends each sequence with "abort"
    tokens_per_step: int = 1
    steps_per_look: int = 1  # that are delivered before the client's side gets to run
    num_cached: int = 0
    is_healthy: bool = True
    seqs: list[Sequence] = field(default_factory=list)
    aborted: list[int] = field(default_factory=list)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)

    def submit(self, seqs: Seq[Sequence]) -> OutputStream:
        if self.refuse is not None:
            raise self.refuse
        self.seqs += seqs
        stream = OutputStream({seq.id: seq.index for seq in seqs}, self.aborted.append)
        task = asyncio.get_running_loop().create_task(self._play(list(seqs), stream))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return stream

    async def _play(self, seqs: list[Sequence], stream: OutputStream) -> None:
        script = [*self.say.encode(), EOS]
        step = 0
        while live := [seq for seq in seqs if seq.finish_reason is None and seq.id not in self.aborted]:
            if step % self.steps_per_look == 0:
                await asyncio.sleep(self.pace)
            if self.gate is not None:
                await self.gate.wait()
            for seq in live:
                stream.push(self._output(seq, script, step))
            step += 1

    def _output(self, seq: Sequence, script: list[int], step: int) -> Output:
        seq.first_scheduled = seq.first_scheduled or seq.arrival
        if step == self.fail_at:
            seq.finish_reason = "error"
            return Output(seq.id, seq.index, [], "error", error=self.error)
        if self.draining:
            seq.finish_reason = "abort"
            return Output(seq.id, seq.index, [], "abort")
        sampled = []
        for _ in range(self.tokens_per_step):
            token_id = script[len(seq.output_ids) % len(script)]
            seq.output_ids.append(token_id)
            top = tuple(TokenLogprob(token_id + k, -0.5 - k) for k in range(seq.params.logprobs or 0))
            sampled.append(Sampled(token_id, None if seq.params.logprobs is None else -0.5, top))
            if token_id in seq.params.stop_token_ids:
                seq.finish_reason = "stop"
            elif len(seq.output_ids) == seq.params.max_tokens:
                seq.finish_reason = "length"
            if seq.finish_reason is not None:
                break
        return Output(
            seq.id,
            seq.index,
            sampled,
            seq.finish_reason,
            self.num_cached,
            num_drafted=self.tokens_per_step - 1,
            num_accepted=min(len(sampled), self.tokens_per_step - 1),
        )

    def drain(self) -> None:
        self.draining = True
        if self.gate is not None:
            self.gate.set()

    def stats(self) -> EngineStats:
        return EngineStats(num_running=3, blocks_total=10, blocks_free=7, blocks_used=3, generated_tokens=42)

    def healthy(self) -> bool:
        return self.is_healthy


class Client:
    """An app over a FakeEngine, and requests to it."""

    def __init__(self, engine: FakeEngine | None = None, dialect: str = "bladellm", **context: Any) -> None:
        self.engine = engine or FakeEngine()
        self.template = FakeTemplate()
        self.summaries: list[RequestSummary] = []
        options = ServerOptions(dialect=dialect, **context.pop("options", {}))
        settings = {"chat_template": self.template, "request_finished": self.summaries.append} | context
        self.server = ServerContext(
            engine=self.engine,
            tokenizer=ByteTokenizer(),
            model_name="tiny",
            url="http://127.0.0.1:8081",
            version="1.2.3",
            options=options,
            **settings,
        )
        self.app = App(self.server)

    async def request(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None, proto: Any = None
    ) -> Answer:
        raw = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        path, _, query = path.partition("?")
        proto = proto or FakeProto(raw)
        await self.app.__rsgi__(FakeScope(method, path, FakeHeaders(headers or {}), query), proto)
        return Answer(proto.status, dict(proto.headers), b"".join(proto.sent))

    async def post(self, path: str, body: Any, **kwargs: Any) -> Answer:
        return await self.request("POST", path, body, **kwargs)

    async def complete(self, headers: dict[str, str] | None = None, **fields: Any) -> Answer:
        return await self.post("/v1/completions", {"prompt": "abc"} | fields, headers=headers)

    async def chat(self, **fields: Any) -> Answer:
        return await self.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]} | fields)


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run it, let what it has started end, and see that nothing is left over."""

    async def guarded() -> T:
        result = await asyncio.wait_for(work, 10)
        for _ in range(5):
            await asyncio.sleep(0)
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left, left
        return result

    return asyncio.run(guarded())


def complete(engine: FakeEngine | None = None, dialect: str = "bladellm", **fields: Any) -> Answer:
    """One completion of a fresh server."""
    return run(Client(engine, dialect).complete(**fields))


def chat(engine: FakeEngine | None = None, dialect: str = "bladellm", **fields: Any) -> Answer:
    """One chat completion of a fresh server."""
    return run(Client(engine, dialect).chat(**fields))
