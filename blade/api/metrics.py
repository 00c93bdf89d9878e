"""Prometheus metrics. Nothing is recorded per token; the engine's own counts are read when they are scraped."""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate
from typing import TYPE_CHECKING, TypeVar

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from prometheus_client.core import Metric

    from blade.types import EngineStats, RequestSummary

Family = TypeVar("Family", GaugeMetricFamily, CounterMetricFamily)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

REQUEST_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)

ENGINE_GAUGES = {
    "num_running": ("blade_engine_sequences_running", "Sequences that take part in steps"),
    "num_waiting": ("blade_engine_sequences_waiting", "Sequences in the queue"),
    "blocks_total": ("blade_kv_blocks", "KV-cache blocks there are"),
    "blocks_used": ("blade_kv_blocks_used", "KV-cache blocks that sequences hold"),
    "blocks_cached": ("blade_kv_blocks_cached", "KV-cache blocks nobody holds whose prefix is still good"),
    "blocks_free": ("blade_kv_blocks_free", "KV-cache blocks that are empty"),
}
ENGINE_COUNTERS = {
    "steps": ("blade_engine_steps", "Steps the engine has run"),
    "steps_failed": ("blade_engine_steps_failed", "Of these, steps in which every sequence failed"),
    "step_seconds": ("blade_engine_step_seconds", "Seconds spent in steps"),
    "prompt_tokens": ("blade_prompt_tokens", "Prompt tokens of sequences that were started"),
    "prompt_tokens_cached": ("blade_prompt_tokens_cached", "Of these, found in the prefix cache"),
    "generated_tokens": ("blade_generated_tokens", "Tokens generated"),
    "draft_tokens": ("blade_draft_tokens", "Draft tokens verified"),
    "draft_tokens_accepted": ("blade_draft_tokens_accepted", "Of these, accepted by the model"),
    "preemptions": ("blade_preemptions", "Times a running sequence had to give up its blocks"),
}
DRAFTER_GAUGES = {"enabled": ("blade_drafter_enabled", "1 until a drafter fails, which turns it off for good")}
DRAFTER_COUNTERS = {
    "seconds": ("blade_drafter_seconds", "Seconds a drafter spent on proposals"),
    "calls": ("blade_drafter_calls", "Times it was asked, for all sequences of a step at once"),
    "tokens_proposed": ("blade_drafter_tokens_proposed", "Tokens it proposed"),
    "tokens_verified": ("blade_drafter_tokens_verified", "Of these, worth a place in a step"),
    "tokens_accepted": ("blade_drafter_tokens_accepted", "Of these, accepted by the model"),
    "drafts_verified": ("blade_drafter_drafts_verified", "Drafts verified; accepted by these is the mean length"),
}


class LoopHistogram(Collector):
    """A histogram for one thread: prometheus_client's takes a lock and 5 us per observation, this one 0.5 us."""

    def __init__(self, name: str, help_text: str, bounds: Sequence[float]) -> None:
        self._name = name
        self._help = help_text
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def collect(self) -> Iterable[Metric]:
        edges = [*(f"{float(bound):g}" for bound in self._bounds), "+Inf"]
        buckets = list(zip(edges, map(float, accumulate(self._counts)), strict=True))
        yield HistogramMetricFamily(self._name, self._help, buckets=buckets, sum_value=self._sum)


class Metrics:
    """All metrics of one server, in a registry of its own. Only the loop thread touches it."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "blade_http_requests", "HTTP responses", ["endpoint", "status"], registry=self._registry
        )
        self._choices = Counter(
            "blade_choices",
            "Choices generated, by why they ended",
            ["endpoint", "finish_reason"],
            registry=self._registry,
        )
        self._queue = self._histogram("queue", "from a request's arrival to its first step", REQUEST_SECONDS)
        self._first_token = self._histogram("time_to_first_token", "from arrival to first token", REQUEST_SECONDS)
        self._request = self._histogram("request", "from a request's arrival to its end", REQUEST_SECONDS)
        self.inter_token = self._histogram("inter_token", "per token after a choice's first", TOKEN_SECONDS)

    def _histogram(self, name: str, what: str, bounds: Sequence[float]) -> LoopHistogram:
        histogram = LoopHistogram(f"blade_{name}_seconds", f"Seconds {what}", bounds)
        self._registry.register(histogram)
        return histogram

    def responded(self, endpoint: str, status: int) -> None:
        self._requests.labels(endpoint, str(status)).inc()

    def finished(self, summary: RequestSummary) -> None:
        for reason in summary.finish_reasons:
            self._choices.labels(summary.endpoint, reason).inc()
        self._request.observe(summary.total_seconds)
        if summary.queue_seconds is not None:
            self._queue.observe(summary.queue_seconds)
        if summary.first_token_seconds is not None:
            self._first_token.observe(summary.first_token_seconds)

    def render(self, stats: EngineStats, healthy: bool) -> bytes:
        """All of it in Prometheus' text format."""
        engine = CollectorRegistry()
        engine.register(_EngineCollector(stats, healthy))
        return generate_latest(self._registry) + generate_latest(engine)


class _EngineCollector(Collector):
    def __init__(self, stats: EngineStats, healthy: bool) -> None:
        self._stats = stats
        self._healthy = healthy

    def collect(self) -> Iterable[Metric]:
        yield GaugeMetricFamily("blade_engine_healthy", "1 while the engine makes progress", value=self._healthy)
        for field, (name, help_text) in ENGINE_GAUGES.items():
            yield GaugeMetricFamily(name, help_text, value=getattr(self._stats, field))
        for field, (name, help_text) in ENGINE_COUNTERS.items():
            yield CounterMetricFamily(name, help_text, value=getattr(self._stats, field))
        for field, (name, help_text) in DRAFTER_GAUGES.items():
            yield self._per_drafter(GaugeMetricFamily(name, help_text, labels=["drafter"]), field)
        for field, (name, help_text) in DRAFTER_COUNTERS.items():
            yield self._per_drafter(CounterMetricFamily(name, help_text, labels=["drafter"]), field)

    def _per_drafter(self, family: Family, field: str) -> Family:
        for drafter in self._stats.drafters:
            family.add_metric([drafter.name], getattr(drafter, field))
        return family
