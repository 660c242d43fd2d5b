"""The names under which metrics are exported: those of Aerie, and those of vLLM for its dashboards,
load tools and routers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from prometheus_client.metrics_core import Metric
from prometheus_client.samples import Sample

OWN = "aerie"
VLLM = "vllm"
ENGINE = {"engine": "0"}  # vLLM numbers its engines
# What vLLM has under the same name with the same meaning.
OF_VLLM = frozenset(
    {
        "num_requests_running",
        "num_requests_waiting",
        "num_requests_waiting_by_reason",
        "kv_cache_usage_perc",
        "cache_config_info",
        "prefix_cache_queries",
        "prefix_cache_hits",
        "num_preemptions",
        "prompt_tokens",
        "prompt_tokens_by_source",
        "prompt_tokens_cached",
        "generation_tokens",
        "request_success",
        "request_prompt_tokens",
        "request_generation_tokens",
        "request_max_num_generation_tokens",
        "request_params_n",
        "request_params_max_tokens",
        "time_to_first_token_seconds",
        "inter_token_latency_seconds",
        "request_time_per_output_token_seconds",
        "e2e_request_latency_seconds",
        "request_queue_time_seconds",
        "request_prefill_time_seconds",
        "request_decode_time_seconds",
        "request_inference_time_seconds",
        "spec_decode_num_drafts",
        "spec_decode_num_draft_tokens",
        "spec_decode_num_accepted_tokens",
        "spec_decode_num_accepted_tokens_per_pos",
        "iteration_tokens_total",
    }
)
# What other programs call so, too: it has no prefix.
STANDARD = ("http_requests", "process_", "python_info")


# Names that vLLM had earlier, which published dashboards ask for.
EARLIER = {
    "inter_token_latency_seconds": "time_per_output_token_seconds",
    "kv_cache_usage_perc": "gpu_cache_usage_perc",
}


class Named:
    """Metrics under all names that the operator wants, as Prometheus' client collects them."""

    def __init__(self, metrics: Iterable[Metric], prefixes: Sequence[str]) -> None:
        """`metrics` have names without a prefix."""
        metrics = list(metrics)
        self._standard = [each for each in metrics if each.name.startswith(STANDARD)]
        self._metrics = [each for each in metrics if not each.name.startswith(STANDARD)]
        self._prefixes = prefixes

    def collect(self) -> Iterator[Metric]:
        for metric in self._standard:
            yield _renamed(metric, metric.name, {})
        if OWN in self._prefixes:
            for metric in self._metrics:
                yield _renamed(metric, f"{OWN}:{metric.name}", {})
        if VLLM in self._prefixes:
            for metric in self._metrics:
                if metric.name in OF_VLLM:
                    yield _renamed(metric, f"{VLLM}:{metric.name}", ENGINE)
                if metric.name in EARLIER:
                    yield _renamed(metric, f"{VLLM}:{EARLIER[metric.name]}", ENGINE)


def _renamed(metric: Metric, name: str, labels: dict[str, str]) -> Metric:
    """The metric under a name. When a series began is left out: the client library writes it as a
    series of its own, which nobody asks for."""
    found = Metric(name, metric.documentation, metric.type)
    found.samples = [
        Sample(name + each.name.removeprefix(metric.name), labels | each.labels, *each[2:])
        for each in metric.samples
        if not each.name.endswith("_created")
    ]
    return found
