"""Prometheus metrics, named as vLLM names them. `metric_names` puts the prefixes in front."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from configs.schema import CacheConfig
from engine.messages import EngineInfo, EngineStats, Finished
from engine.request import FinishReason
from server.http.engine_client import EngineClient
from server.http.monitoring.metric_names import OWN, Named
from server.version import version

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1, 2.5, 5)
LENGTHS = tuple(step * 10**power for power in range(6) for step in (1, 2, 5))  # tokens
# which limit of the queue, or of the bodies, was reached
REQUESTS, CHOICES, TOKENS, BODIES = "requests", "choices", "tokens", "body_bytes"
DRAINING, ENGINE_NOT_READY = "draining", "engine_not_ready"
CONNECTIONS = "connections"  # too many are open
REJECTIONS = (REQUESTS, CHOICES, TOKENS, BODIES, DRAINING, ENGINE_NOT_READY, CONNECTIONS)
LABEL = "model_name"
METHODS = frozenset(("GET", "HEAD", "POST", "DELETE", "OPTIONS"))
OTHER = "other"
# Where prompt tokens come from, and why requests wait; vLLM has the same values.
COMPUTED, CACHED, TRANSFERRED = "local_compute", "local_cache_hit", "external_kv_transfer"
CAPACITY, DEFERRED = "capacity", "deferred"
COUNTS = (1, 2, 5, 10, 20)
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
FIRST, BETWEEN = "time_to_first_token_seconds", "inter_token_latency_seconds"
PER_TOKEN = "request_time_per_output_token_seconds"
WHOLE, QUEUE = "e2e_request_latency_seconds", "request_queue_time_seconds"
PREFILL, DECODE = "request_prefill_time_seconds", "request_decode_time_seconds"
INFERENCE = "request_inference_time_seconds"
NUM_PROMPT, NUM_GENERATED = "request_prompt_tokens", "request_generation_tokens"
LONGEST = "request_max_num_generation_tokens"
ASKED_LENGTH, ASKED_CHOICES = "request_params_max_tokens", "request_params_n"
HISTOGRAMS: Mapping[str, tuple[str, Sequence[float]]] = {
    FIRST: ("Arrival to first token", SECONDS),
    BETWEEN: ("Time per token after the first", TOKEN_SECONDS),
    PER_TOKEN: ("Mean time per token after the first, of each request", TOKEN_SECONDS),
    WHOLE: ("Arrival to end", SECONDS),
    QUEUE: ("Arrival to first step", SECONDS),
    PREFILL: ("First step to first token", SECONDS),
    DECODE: ("First token to end", SECONDS),
    INFERENCE: ("First step to end", SECONDS),
    NUM_PROMPT: ("Prompt tokens of each request", LENGTHS),
    NUM_GENERATED: ("Output tokens of each request", LENGTHS),
    LONGEST: ("Most output tokens of a choice, of each HTTP request", LENGTHS),
    ASKED_LENGTH: ("Limit of output tokens, of each prompt", LENGTHS),
    ASKED_CHOICES: ("Choices of a prompt, of each HTTP request", COUNTS),
}
PER_POSITION, STEPS, PARTS = "spec_decode_num_accepted_tokens_per_pos", "steps", "step_seconds"
LABELLED = {  # metric -> (label, help); the counts are those of `_labelled`
    PER_POSITION: ("position", "Accepted draft tokens, by depth; 0: children of the root"),
    STEPS: ("tree", "Engine steps, by the shape of their draft trees; root: no drafts"),
    PARTS: ("part", "Seconds of engine steps, spent in draft, verify and commit"),
}


class EngineCollector(Collector):
    """Statistics of the engine at the time of the scrape."""

    def __init__(self, client: EngineClient, model_name: str, config: CacheConfig) -> None:
        self._client = client
        self._model_name = model_name
        self._config = config
        self._totals = {name: _Monotone() for name in COUNTERS}
        self._labelled = {name: _MonotoneByLabel() for name in LABELLED}

    def collect(self) -> Iterator[Metric]:
        stats = self._client.stats
        yield from self._gauges(stats)
        yield self._restarts()
        yield self._waiting(stats)
        yield self._cache_config()
        yield from self._counters(stats)
        yield from self._labelled_counters(stats)
        yield self._acceptance_length()
        yield self._step_sizes()

    def _gauges(self, stats: EngineStats | None) -> Iterator[Metric]:
        ready = self._client.info is not None
        for name, (attribute, text) in GAUGES.items():
            gauge = GaugeMetricFamily(name, text, labels=[LABEL])
            value = getattr(stats, attribute) if stats is not None and ready else 0
            gauge.add_metric([self._model_name], value)
            yield gauge

    def _restarts(self) -> Metric:
        text = "Starts of the engine process after the first"
        counter = CounterMetricFamily("engine_restarts", text, labels=[LABEL])
        counter.add_metric([self._model_name], self._client.num_restarts)
        return counter

    def _waiting(self, stats: EngineStats | None) -> Metric:
        """Those that wait for room, and those whose grammar is not compiled yet."""
        text = "Sequences waiting in the engine, by reason"
        gauge = GaugeMetricFamily("num_requests_waiting_by_reason", text, labels=[LABEL, "reason"])
        ready = stats is not None and self._client.info is not None
        waiting = stats.num_waiting if stats is not None and ready else 0
        deferred = stats.num_deferred if stats is not None and ready else 0
        for reason, count in ((CAPACITY, waiting - deferred), (DEFERRED, deferred)):
            gauge.add_metric([self._model_name, reason], count)
        return gauge

    def _cache_config(self) -> Metric:
        """A gauge that is always 1; its labels are settings of the KV cache."""
        info = self._client.info
        found = {} if info is None else _cache_labels(info, self._config)
        gauge = GaugeMetricFamily("cache_config_info", "The KV cache", labels=[LABEL, *found])
        if found:
            gauge.add_metric([self._model_name, *found.values()], 1)
        return gauge

    def _counters(self, stats: EngineStats | None) -> Iterator[Metric]:
        for name, (attribute, text) in COUNTERS.items():
            counter = CounterMetricFamily(name, text, labels=[LABEL])
            found = None if stats is None else getattr(stats, attribute)
            counter.add_metric([self._model_name], self._totals[name].read(found))
            yield counter

    def _labelled_counters(self, stats: EngineStats | None) -> Iterator[Metric]:
        found = None if stats is None else _labelled(stats)
        for name, (label, text) in LABELLED.items():
            counter = CounterMetricFamily(name, text, labels=[LABEL, label])
            totals = self._labelled[name].read(None if found is None else found[name])
            for value, total in totals.items():
                counter.add_metric([self._model_name, value], total)
            yield counter

    def _step_sizes(self) -> Metric:
        """A histogram, in spite of its name, which is vLLM's."""
        found = HistogramMetricFamily(
            "iteration_tokens_total", "Tokens computed in an engine step", labels=[LABEL]
        )
        sizes = self._client.step_sizes
        bounds = [*map(floatToGoString, sizes.BOUNDS), "+Inf"]
        buckets = list(zip(bounds, itertools.accumulate(sizes.counts), strict=True))
        found.add_metric([self._model_name], buckets, sizes.num_tokens)
        return found

    def _acceptance_length(self) -> Metric:
        """From the counters as last read; 1 if there were no drafts."""
        text = "Mean tokens per step with a draft, the target's own included, since the start"
        gauge = GaugeMetricFamily("spec_decode_acceptance_length", text, labels=[LABEL])
        num_drafts = self._totals["spec_decode_num_drafts"].total
        num_accepted = self._totals["spec_decode_num_accepted_tokens"].total
        gauge.add_metric([self._model_name], 1 + num_accepted / max(num_drafts, 1))
        return gauge


def _cache_labels(info: EngineInfo, config: CacheConfig) -> dict[str, str]:
    return {
        "block_size": str(info.block_size),
        "num_gpu_blocks": str(info.num_blocks),
        "kv_cache_size_tokens": str(info.num_blocks * info.block_size),
        "num_gpu_blocks_override": str(config.num_blocks),
        "gpu_memory_utilization": str(config.memory_fraction),
        "enable_prefix_caching": str(config.prefix_caching),
        "cache_dtype": info.cache_dtype,
    }


def _labelled(stats: EngineStats) -> dict[str, Mapping[str, float]]:
    """For each metric of LABELLED, its counts by label value."""
    positions = enumerate(stats.accepted_per_position)
    return {
        PER_POSITION: {str(position): count for position, count in positions},
        STEPS: stats.steps_by_tree,
        PARTS: stats.seconds_by_part,
    }


class _Constant(Collector):
    """One metric that does not change."""

    def __init__(self, metric: Metric) -> None:
        self._metric = metric

    def collect(self) -> Iterator[Metric]:
        yield self._metric


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

    def __init__(
        self,
        client: EngineClient,
        model_name: str,
        cache: CacheConfig,
        prefixes: Sequence[str] = (OWN,),
    ) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(EngineCollector(client, model_name, cache))
        self._model_name = model_name
        self._prefixes = prefixes
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)
        build = GaugeMetricFamily("build_info", "The version of Aerie", labels=["version"])
        build.add_metric([version()], 1)
        self._registry.register(_Constant(build))
        self._answered = Counter(
            "http_requests",
            "HTTP requests that were answered, by route and class of status",
            ["handler", "method", "status"],
            registry=self._registry,
        )
        self._prompt_tokens = self._counter(
            "prompt_tokens", "Prompt tokens of requests that have begun to answer or have ended"
        )
        self._generated = self._counter("generation_tokens", "Tokens sent by the engine")
        self._histograms = {name: self._histogram(name, *rest) for name, rest in HISTOGRAMS.items()}
        self._from_cache = self._counter("prompt_tokens_cached", "Prompt tokens not computed again")
        self._sources = Counter(
            "prompt_tokens_by_source",
            "Prompt tokens of ended requests, by where their keys and values came from",
            [LABEL, "source"],
            registry=self._registry,
        )
        for source in (COMPUTED, CACHED, TRANSFERRED):
            self._sources.labels(model_name, source)
        self._ended = Counter(
            "request_success",
            "Requests that ended, by reason",
            [LABEL, "finished_reason"],
            registry=self._registry,
        )
        self._rejected = Counter(
            "admission_rejections",
            "HTTP requests answered 429 or 503, by reason",
            [LABEL, "reason"],
            registry=self._registry,
        )
        for finished_reason in FinishReason:
            self._ended.labels(model_name, finished_reason.value)
        for reason in REJECTIONS:
            self._rejected.labels(model_name, reason)

    def add(self, collector: Callable[[str, str], Collector]) -> None:
        """Export what else a server counts; `collector` takes the label and its value."""
        self._registry.register(collector(LABEL, self._model_name))

    def reject(self, reason: str) -> None:
        """An HTTP request was refused admission; `reason` is one of REJECTIONS."""
        self._rejected.labels(self._model_name, reason).inc()

    def answer(self, route: str | None, method: str, status: int) -> None:
        """An HTTP request was answered. `route`: the path of its route; None without one."""
        known = method if method in METHODS else OTHER
        self._answered.labels(route or OTHER, known, f"{status // 100}xx").inc()

    def first_tokens(self, num_tokens: int, seconds: float, num_prompt: int) -> None:
        """The first tokens of a request came, `seconds` after its arrival."""
        self._prompt_tokens.inc(num_prompt)
        self._generated.inc(num_tokens)
        self._observe(FIRST, seconds)

    def next_tokens(self, num_tokens: int, seconds: float) -> None:
        """Further tokens came, `seconds` after the previous ones."""
        self._generated.inc(num_tokens)
        self._observe(BETWEEN, seconds / num_tokens)

    def finish(self, event: Finished, reason: str, arrival: float, answered: bool) -> None:
        """A request ended. `reason` is a FinishReason; times are those of time.time(). `answered`:
        its first tokens came."""
        now = time.time()
        if not answered:
            self._prompt_tokens.inc(event.num_prompt)
        self._count_tokens(event)
        self._ended.labels(self._model_name, reason).inc()
        self._observe(WHOLE, max(now - arrival, 0))
        scheduled, first = event.first_scheduled_time, event.first_token_time
        if scheduled is not None:
            self._observe(QUEUE, max(scheduled - arrival, 0))
            if first is not None:
                self._observe(PREFILL, max(first - scheduled, 0))
                self._observe(DECODE, max(now - first, 0))
                self._observe(INFERENCE, max(now - scheduled, 0))
                if event.num_output > 1:
                    self._observe(PER_TOKEN, max(now - first, 0) / (event.num_output - 1))

    def ask(self, num_choices: int, max_tokens: Sequence[int]) -> None:
        """An HTTP request was admitted, with limits of the output of each of its prompts."""
        self._observe(ASKED_CHOICES, num_choices)
        for limit in max_tokens:
            self._observe(ASKED_LENGTH, limit)

    def end(self, lengths: Sequence[int]) -> None:
        """All choices of an HTTP request have ended, with so many output tokens."""
        self._observe(LONGEST, max(lengths))

    def _observe(self, name: str, value: float) -> None:
        self._histograms[name].observe(value)

    def _count_tokens(self, event: Finished) -> None:
        num_cached = min(event.num_cached, event.num_prompt)
        self._from_cache.inc(num_cached)
        self._sources.labels(self._model_name, CACHED).inc(num_cached)
        self._sources.labels(self._model_name, COMPUTED).inc(event.num_prompt - num_cached)
        self._observe(NUM_PROMPT, event.num_prompt)
        self._observe(NUM_GENERATED, event.num_output)

    def render(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(Named(self._registry.collect(), self._prefixes))

    def _counter(self, name: str, text: str) -> Counter:
        counter = Counter(name, text, [LABEL], registry=self._registry)
        return counter.labels(self._model_name)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        histogram = Histogram(name, text, [LABEL], buckets=buckets, registry=self._registry)
        return histogram.labels(self._model_name)
