"""The names of metrics: Aerie's own and those of vLLM."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import httpx
import msgspec
import pytest

from engine.messages import EngineStats
from engine.request import FinishReason
from server.http.monitoring.metric_names import STANDARD
from server.version import version
from tests.support.engines.scripted_engine import finished, tokens
from tests.support.servers.http_server import CHAT, CHAT_PATH, Server

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
        assert name.startswith("request") or own[known] == value
    assert not any(name.startswith(("iterations", "steps", "captured")) for name in found)
    assert not any("_created" in name for name in found)


@pytest.mark.parametrize("prefix", ["aerie", "vllm"])
def test_the_operator_chooses_the_names_of_metrics(make_server: MakeServer, prefix: str) -> None:
    text = make_server(metrics_prefixes=(prefix,)).get("/metrics").text
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert {line.partition(":")[0] for line in lines if not line.startswith(STANDARD)} == {prefix}


def test_what_programs_have_in_common_has_the_usual_names(make_server: MakeServer) -> None:
    server = make_server(root_path="/llm")
    server.chat()
    server.get("/llm/v1/responses/none")
    server.request("PURGE", "/nowhere")
    text = server.get("/metrics").text
    for line in (
        'http_requests_total{handler="/v1/chat/completions",method="POST",status="2xx"} 1.0',
        'http_requests_total{handler="/v1/responses/{response_id}",method="GET",status="4xx"} 1.0',
        'http_requests_total{handler="other",method="other",status="4xx"} 1.0',
    ):
        assert f"\n{line}\n" in text
    for name in ("process_resident_memory_bytes ", "process_cpu_seconds_total ", "python_info{"):
        assert f"\n{name}" in text
    assert f'\naerie:build_info{{version="{version()}"}} 1.0\n' in text


def test_steps_are_counted_by_their_tokens(make_server: MakeServer) -> None:
    server = make_server()
    for num_steps, num_tokens in ((1, 8), (2, 9), (2, 9), (3, 0), (1, 20_000)):
        stats = msgspec.structs.replace(STATS, num_steps=num_steps, last_step_tokens=num_tokens)
        server.engine.step_sizes.observe(stats)
    found = samples(server, "vllm:iteration_tokens_total")
    bucket = '_bucket{{engine="0",le="{}",model_name="tiny"}}'
    bounds = {bound: found[bucket.format(bound)] for bound in ("1.0", "8.0", "16.0", "+Inf")}
    assert bounds == {"1.0": 0, "8.0": 1, "16.0": 2, "+Inf": 3}
    rest = 'engine="0",model_name="tiny"'
    assert found[f"_count{{{rest}}}"] == 3
    assert found[f"_sum{{{rest}}}"] == 20_017


def test_prompt_tokens_are_counted_while_the_request_runs(make_server: MakeServer) -> None:
    server = make_server(script=lambda request: [tokens(request, [5])])
    name = 'prompt_tokens_total{model_name="tiny"}'

    async def ask(client: httpx.AsyncClient) -> None:
        asked = asyncio.create_task(client.post(CHAT_PATH, json=CHAT))
        while not server.engine.submitted:
            await asyncio.sleep(0)
        (request,) = server.engine.submitted
        while f"aerie:{name} 0.0" in (text := (await client.get("/metrics")).text):
            await asyncio.sleep(0)
        assert f"aerie:{name} {len(request.prompt_ids)}.0" in text
        server.engine.feed(finished(request, FinishReason.LENGTH))
        await asked
        assert f"aerie:{name} {len(request.prompt_ids)}.0" in (await client.get("/metrics")).text

    server.run(ask)
