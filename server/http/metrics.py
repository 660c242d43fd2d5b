"""Prometheus metrics, named as vLLM names them, for its dashboards."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from engine.messages import EngineStats, Finished
from engine.request import FinishReason
from server.http.engine_client import EngineClient

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1, 2.5, 5)
# which limit of the queue, or of the bodies, was reached
REQUESTS, CHOICES, TOKENS, BODIES = "requests", "choices", "tokens", "body_bytes"
DRAINING, ENGINE_NOT_READY = "draining", "engine_not_ready"
CONNECTIONS = "connections"  # too many are open
REJECTIONS = (REQUESTS, CHOICES, TOKENS, BODIES, DRAINING, ENGINE_NOT_READY, CONNECTIONS)
LABEL = "model_name"
GAUGES = {  # metric -> (attribute of EngineStats, help)
    "num_requests_running": ("num_running", "Sequences in the running batch"),
    "num_requests_waiting": ("num_waiting", "Sequences waiting in the engine"),
    "kv_cache_usage_perc": ("kv_usage", "Share of the KV cache in use; 1 is full"),
    "iteration_tokens": ("last_step_tokens", "Tokens computed in the newest engine step"),
    "draft_head_failed": ("draft_failed", "1: the draft head failed and is no longer used"),
}
COUNTERS = {
    "prefix_cache_queries": ("prefix_queries", "Prompt tokens looked up in the prefix cache"),
    "prefix_cache_hits": ("prefix_hits", "Prompt tokens taken from the prefix cache"),
    "num_preemptions": ("num_preemptions", "Preemptions: sequences that lost their cache blocks"),
    "iterations": ("num_steps", "Engine steps"),
    "spec_decode_num_drafts": ("num_drafts", "Draft trees that were verified"),
    "spec_decode_num_draft_tokens": ("num_draft_tokens", "Draft tokens that were verified"),
    "spec_decode_num_accepted_tokens": ("num_accepted_tokens", "Draft tokens that were accepted"),
    "captured_sequences": ("num_captured", "Sequences queued to be written to capture.dir"),
    "capture_dropped": ("num_capture_dropped", "Sampled sequences that could not be written"),
    "unsound_logits": ("num_unsound", "Requests ended by NaN or infinite logits of the model"),
    "draft_head_faults": ("num_draft_faults", "Trees not drafted: the head gave non-finite values"),
}
PER_POSITION, STEPS, PARTS = "spec_decode_num_accepted_tokens_per_pos", "steps", "step_seconds"
LABELLED = {  # metric -> (label, help); the counts are those of `_labelled`
    PER_POSITION: ("position", "Accepted draft tokens, by depth; 0: children of the root"),
    STEPS: ("tree", "Engine steps, by the shape of their draft trees; root: no drafts"),
    PARTS: ("part", "Seconds of engine steps, spent in draft, verify and commit"),
}


class EngineCollector(Collector):
    """Statistics of the engine at the time of the scrape."""

    def __init__(self, client: EngineClient, model_name: str) -> None:
        self._client = client
        self._model_name = model_name
        self._totals = {name: _Monotone() for name in COUNTERS}
        self._labelled = {name: _MonotoneByLabel() for name in LABELLED}

    def collect(self) -> Iterator[Metric]:
        stats = self._client.stats
        yield from self._gauges(stats)
        yield from self._counters(stats)
        yield from self._labelled_counters(stats)
        yield self._acceptance_length()

    def _gauges(self, stats: EngineStats | None) -> Iterator[Metric]:
        ready = self._client.info is not None
        for name, (attribute, text) in GAUGES.items():
            gauge = GaugeMetricFamily(f"aerie:{name}", text, labels=[LABEL])
            value = getattr(stats, attribute) if stats is not None and ready else 0
            gauge.add_metric([self._model_name], value)
            yield gauge

    def _counters(self, stats: EngineStats | None) -> Iterator[Metric]:
        for name, (attribute, text) in COUNTERS.items():
            counter = CounterMetricFamily(f"aerie:{name}", text, labels=[LABEL])
            found = None if stats is None else getattr(stats, attribute)
            counter.add_metric([self._model_name], self._totals[name].read(found))
            yield counter

    def _labelled_counters(self, stats: EngineStats | None) -> Iterator[Metric]:
        found = None if stats is None else _labelled(stats)
        for name, (label, text) in LABELLED.items():
            counter = CounterMetricFamily(f"aerie:{name}", text, labels=[LABEL, label])
            totals = self._labelled[name].read(None if found is None else found[name])
            for value, total in totals.items():
                counter.add_metric([self._model_name, value], total)
            yield counter

    def _acceptance_length(self) -> Metric:
        """From the counters as last read; 1 if there were no drafts."""
        text = "Mean tokens per step with a draft, the target's own included, since the start"
        gauge = GaugeMetricFamily("aerie:spec_decode_acceptance_length", text, labels=[LABEL])
        num_drafts = self._totals["spec_decode_num_drafts"].total
        num_accepted = self._totals["spec_decode_num_accepted_tokens"].total
        gauge.add_metric([self._model_name], 1 + num_accepted / max(num_drafts, 1))
        return gauge


def _labelled(stats: EngineStats) -> dict[str, Mapping[str, float]]:
    """For each metric of LABELLED, its counts by label value."""
    positions = enumerate(stats.accepted_per_position)
    return {
        PER_POSITION: {str(position): count for position, count in positions},
        STEPS: stats.steps_by_tree,
        PARTS: stats.seconds_by_part,
    }


class _Monotone:
    """A counter that never falls, although a restarted engine counts from zero again."""

    def __init__(self) -> None:
        self._before = 0.0  # counted by earlier engines
        self._newest = 0.0

    @property
    def total(self) -> float:
        return self._before + self._newest

    def read(self, value: float | None) -> float:
        if value is not None:
            if value < self._newest:
                self._before += self._newest
            self._newest = value
        return self.total


class _MonotoneByLabel:
    """A `_Monotone` per value of a label. Values that an engine does not report count as 0."""

    def __init__(self) -> None:
        self._totals: dict[str, _Monotone] = {}

    def read(self, values: Mapping[str, float] | None) -> dict[str, float]:
        for label in values or ():
            self._totals.setdefault(label, _Monotone())
        return {
            label: total.read(None if values is None else values.get(label, 0))
            for label, total in self._totals.items()
        }


class Metrics:
    """Counts and times of requests. Each application has its own registry."""

    def __init__(self, client: EngineClient, model_name: str) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(EngineCollector(client, model_name))
        self._model_name = model_name
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of ended requests")
        self._generated = self._counter("generation_tokens", "Tokens sent by the engine")
        self._first = self._histogram("time_to_first_token_seconds", "Arrival to first token")
        self._between = self._histogram(
            "inter_token_latency_seconds", "Time per token after the first", TOKEN_SECONDS
        )
        self._whole = self._histogram("e2e_request_latency_seconds", "Arrival to end")
        self._queue = self._histogram("request_queue_time_seconds", "Arrival to first step")
        self._prefill = self._histogram("request_prefill_time_seconds", "First step to first token")
        self._decode = self._histogram("request_decode_time_seconds", "First token to end")
        self._ended = Counter(
            "aerie:request_success",
            "Requests that ended, by reason",
            [LABEL, "finished_reason"],
            registry=self._registry,
        )
        self._rejected = Counter(
            "aerie:admission_rejections",
            "HTTP requests answered 429 or 503, by reason",
            [LABEL, "reason"],
            registry=self._registry,
        )
        for finished_reason in FinishReason:
            self._ended.labels(model_name, finished_reason.value)
        for reason in REJECTIONS:
            self._rejected.labels(model_name, reason)

    def reject(self, reason: str) -> None:
        """An HTTP request was refused admission; `reason` is one of REJECTIONS."""
        self._rejected.labels(self._model_name, reason).inc()

    def first_tokens(self, num_tokens: int, seconds: float) -> None:
        """The first tokens of a request came, `seconds` after its arrival."""
        self._generated.inc(num_tokens)
        self._first.observe(seconds)

    def next_tokens(self, num_tokens: int, seconds: float) -> None:
        """Further tokens came, `seconds` after the previous ones."""
        self._generated.inc(num_tokens)
        self._between.observe(seconds / num_tokens)

    def finish(self, event: Finished, reason: str, arrival: float) -> None:
        """A request ended. `reason` is a FinishReason; times are those of time.time()."""
        now = time.time()
        self._prompt_tokens.inc(event.num_prompt)
        self._ended.labels(self._model_name, reason).inc()
        self._whole.observe(max(now - arrival, 0))
        scheduled, first = event.first_scheduled_time, event.first_token_time
        if scheduled is not None:
            self._queue.observe(max(scheduled - arrival, 0))
            if first is not None:
                self._prefill.observe(max(first - scheduled, 0))
                self._decode.observe(max(now - first, 0))

    def render(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self._registry)

    def _counter(self, name: str, text: str) -> Counter:
        counter = Counter(f"aerie:{name}", text, [LABEL], registry=self._registry)
        return counter.labels(self._model_name)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...] = SECONDS) -> Histogram:
        histogram = Histogram(
            f"aerie:{name}", text, [LABEL], buckets=buckets, registry=self._registry
        )
        return histogram.labels(self._model_name)
