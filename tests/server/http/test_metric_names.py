"""The names of metrics: Aerie's own and those of vLLM."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from engine.messages import EngineStats
from tests.support.http_server import Server

MakeServer = Callable[..., Server]
STATS = EngineStats(
    num_running=3,
    num_waiting=2,
    kv_usage=0.25,
    prefix_queries=20,
    prefix_hits=10,
    num_preemptions=1,
    num_steps=9,
    last_step_tokens=17,
    num_deferred=1,
)


def samples(server: Server, prefix: str) -> dict[str, float]:
    lines = server.get("/metrics").text.splitlines()
    pairs = (line.rpartition(" ") for line in lines if line.startswith(prefix))
    return {name.removeprefix(prefix): float(value) for name, _, value in pairs}


def test_vllm_names_have_its_labels_and_the_same_values(make_server: MakeServer) -> None:
    server = make_server()
    server.engine.stats = STATS
    server.chat(n=2)
    num_prompt = sum(len(request.prompt_ids) for request in server.engine.submitted)
    found = samples(server, "vllm:")
    rest = 'engine="0",model_name="tiny"'
    expected = {
        f"num_requests_waiting{{{rest}}}": 2,
        f'num_requests_waiting_by_reason{{{rest},reason="capacity"}}': 1,
        f'num_requests_waiting_by_reason{{{rest},reason="deferred"}}': 1,
        f"prompt_tokens_total{{{rest}}}": num_prompt,
        f'prompt_tokens_by_source_total{{{rest},source="local_cache_hit"}}': 32,
        f'prompt_tokens_by_source_total{{{rest},source="local_compute"}}': num_prompt - 32,
        f'prompt_tokens_by_source_total{{{rest},source="external_kv_transfer"}}': 0,
        f"prompt_tokens_cached_total{{{rest}}}": 32,
        'request_success_total{engine="0",finished_reason="stop",model_name="tiny"}': 2,
        f"request_time_per_output_token_seconds_count{{{rest}}}": 2,
        f"request_max_num_generation_tokens_count{{{rest}}}": 1,
        f"request_params_n_sum{{{rest}}}": 2,
        f"request_inference_time_seconds_count{{{rest}}}": 2,
        f"spec_decode_num_drafts_total{{{rest}}}": 0,
    }
    assert {name: found.get(name) for name in expected} == expected
    (config,) = (name for name in found if name.startswith("cache_config_info"))
    for label in ('block_size="16"', 'num_gpu_blocks="32"', 'enable_prefix_caching="True"'):
        assert label in config
    assert found[f"time_per_output_token_seconds_count{{{rest}}}"] > 0
    assert found.pop(f"gpu_cache_usage_perc{{{rest}}}") == 0.25
    found = {name: value for name, value in found.items() if not name.startswith("time_per")}
    own = samples(server, "aerie:")
    for name, value in found.items():
        known = name.replace('engine="0",', "")
        assert name.startswith("request") or "_created" in name or own[known] == value
    assert not any(name.startswith(("iteration", "steps", "captured")) for name in found)


@pytest.mark.parametrize("prefix", ["aerie", "vllm"])
def test_the_operator_chooses_the_names_of_metrics(make_server: MakeServer, prefix: str) -> None:
    text = make_server(metrics_prefixes=(prefix,)).get("/metrics").text
    names = {line.partition(":")[0] for line in text.splitlines() if not line.startswith("#")}
    assert names == {prefix}
