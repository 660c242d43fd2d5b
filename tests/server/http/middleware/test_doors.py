"""Checks before the routes: ids, keys, sizes; and the routes for operators."""

from __future__ import annotations

import asyncio
import importlib.metadata
import logging
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from configs.schema import CacheConfig, ServerConfig
from engine.messages import EngineStats
from server.http.middleware.keys import load_api_keys
from server.http.monitoring.metrics import Metrics
from server.process.channel.client import ZmqEngineClient
from tests.server.openai.test_refusals import error_of
from tests.support.engines.scripted_engine import INFO
from tests.support.servers.http_server import CHAT, CHAT_PATH, Server

MakeServer = Callable[..., Server]
KEYS = ("first-key", "zweiter-schlüssel")


@pytest.mark.parametrize("path", [CHAT_PATH, "/v1/completions", "/tokenize", "/nowhere"])
@pytest.mark.parametrize("authorization", [None, "first-key", "Basic first-key", "Bearer no"])
def test_without_a_right_key_it_is_401(
    make_server: MakeServer, path: str, authorization: str | None
) -> None:
    server = make_server(api_keys=KEYS)
    headers = {} if authorization is None else {"authorization": authorization}
    error = error_of(server.post(path, CHAT, headers=headers), 401)
    assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("scheme", ["Bearer", "bearer"])
def test_each_key_opens(make_server: MakeServer, key: str, scheme: str) -> None:
    server = make_server(api_keys=KEYS)
    headers = {b"authorization": f"{scheme} {key}".encode()}
    assert server.post(CHAT_PATH, CHAT, headers=headers).status_code == 200


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics", "/docs", "/openapi.json"])
def test_probes_and_documentation_need_no_key(make_server: MakeServer, path: str) -> None:
    assert make_server(api_keys=KEYS).get(path).status_code == 200


def test_info_and_models_need_a_key(make_server: MakeServer) -> None:
    server = make_server(api_keys=KEYS)
    for path in ("/info", "/v1/models"):
        error_of(server.get(path), 401)


def test_keys_come_from_configuration_and_file(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# ours\nsecond\n\n third \n # not a key\n\t#neither\n")
    config = ServerConfig(api_keys=("first", "second"), api_key_file=path)
    assert load_api_keys(config) == ("first", "second", "third")


@pytest.mark.parametrize(("mode", "warns"), [(0o600, False), (0o640, False), (0o604, True)])
def test_key_files_that_everybody_can_read_are_warned_of_once(
    make_server: MakeServer,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    mode: int,
    warns: bool,
) -> None:
    path = tmp_path / "keys"
    path.write_text("secret\n")
    path.chmod(mode)
    make_server(admin_key_file=path)
    said = f"server.admin_key_file {path} can be read by every user"
    assert caplog.text.count(said) == warns


def test_a_key_file_that_is_a_pipe_is_an_error(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "keys")
    with pytest.raises(ValueError, match=r"server\.api_key_file .*keys is a pipe, not a regular"):
        load_api_keys(ServerConfig(api_key_file=tmp_path / "keys"))


@pytest.mark.parametrize("content", [None, "", "# none\n", " # none\n"])
def test_key_files_without_a_key_are_an_error(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "keys"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=r"server\.api_key_file"):
        load_api_keys(ServerConfig(api_key_file=path))


def test_every_key_is_compared_even_after_a_match(
    make_server: MakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = make_server(api_keys=("a", "b", "c"))
    compared = []

    def counting(left: bytes, right: bytes) -> bool:
        compared.append(right)
        return left == right

    monkeypatch.setattr("server.http.middleware.keys.hmac.compare_digest", counting)
    for key in ("a", "c", "x"):
        server.get("/info", headers={"authorization": f"Bearer {key}"})
    assert len(compared) == 9


def test_empty_keys_are_an_error() -> None:
    with pytest.raises(ValueError, match="empty key"):
        load_api_keys(ServerConfig(api_keys=("a", " ")))


@pytest.mark.parametrize("sent", ["abc-1", "x" * 128, "two words"])
def test_sane_request_ids_are_kept(server: Server, sent: str) -> None:
    for path in ("/health", "/nowhere"):
        response = server.get(path, headers={"x-request-id": sent})
        assert response.headers.get_list("x-request-id") == [sent]


@pytest.mark.parametrize("sent", [b"", b"x" * 129, "é".encode(), b"a\tb"])
def test_other_request_ids_are_replaced(server: Server, sent: bytes) -> None:
    made = server.get("/health", headers={b"x-request-id": sent}).headers["x-request-id"]
    assert made.startswith("req_")


def test_requests_with_equal_ids_do_not_collide_in_the_engine(server: Server) -> None:
    for _ in range(2):
        server.post(CHAT_PATH, CHAT, headers={"x-request-id": "same"})
    first, second = server.engine.submitted
    assert first.request_id != second.request_id


def test_announced_bodies_above_the_limit_are_413(make_server: MakeServer) -> None:
    server = make_server(max_body_bytes=1000)
    error = error_of(server.chat(user="x" * 1000), 413)
    assert (error["type"], error["code"]) == ("invalid_request_error", "request_too_large")
    assert server.chat(user="x" * 800).status_code == 200


def test_bodies_of_five_megabytes_are_413_by_default(server: Server) -> None:
    error_of(server.complete(prompt="a" * 5_000_000), 413)


def test_bodies_below_the_limit_and_far_above_the_context_are_400(server: Server) -> None:
    error = error_of(server.complete(prompt="a" * 4_000_000), 400)
    assert error["code"] == "context_length_exceeded"


def test_bodies_without_a_length_are_counted(make_server: MakeServer) -> None:
    server = make_server(max_body_bytes=1000)

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(11):
            yield b" " * 100

    headers = {"content-type": "application/json"}
    error_of(server.request("POST", CHAT_PATH, content=chunks(), headers=headers), 413)


@pytest.mark.parametrize("length", ["-1", "abc", "9" * 30])
def test_absurd_lengths_are_refused(server: Server, length: str) -> None:
    headers = {"content-length": length, "content-type": "application/json"}
    response = server.request("POST", CHAT_PATH, content=b"{}", headers=headers)
    error_of(response, 413 if length.isdigit() else 400)


def test_ready_says_why_it_is_not(server: Server) -> None:
    assert server.get("/ready").json() == {"status": "ready"}
    server.engine.info = None
    response = server.get("/ready")
    assert error_of(response, 503)["code"] == "engine_not_ready"
    assert response.headers["retry-after"] == "1"
    server.engine.info = INFO
    server.context.state.start_draining()
    assert error_of(server.get("/ready"), 503)["code"] == "draining"
    assert server.get("/health").status_code == 200
    name = 'aerie:admission_rejections_total{model_name="tiny",reason="draining"}'
    assert f"{name} 0.0" in server.get("/metrics").text  # probes are not counted as rejections


def test_info_shows_configuration_versions_and_kernels_but_no_key(make_server: MakeServer) -> None:
    server = make_server(api_keys=("secret-1", "secret-2"))
    response = server.get("/info", headers={"authorization": "Bearer secret-1"})
    content = response.json()
    assert "secret-" not in response.text
    assert content["config"]["server"]["api_keys"] == ["***", "***"]
    assert content["engine"]["ops"] == {"linear": "scripted"}
    assert {"python", "aerie", "torch"} <= set(content["versions"])


def test_a_server_that_is_not_installed_has_an_unknown_version(
    make_server: MakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.metadata.distribution

    def missing(name: str) -> importlib.metadata.Distribution:
        if name == "aerie":
            raise importlib.metadata.PackageNotFoundError(name)
        return find(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    server = make_server()
    assert server.get("/info").json()["versions"]["aerie"] == "0+unknown"
    assert server.get("/openapi.json").json()["info"]["version"] == "0+unknown"


def metric(server: Server, name: str) -> float:
    for line in server.get("/metrics").text.splitlines():
        if line.startswith((name + "{", name + " ")):
            return float(line.rpartition(" ")[2])
    raise AssertionError(f"no metric {name}")


def stats(hits: int, running: int = 3) -> EngineStats:
    return EngineStats(
        num_running=running,
        num_waiting=2,
        kv_usage=0.25,
        prefix_queries=2 * hits,
        prefix_hits=hits,
        num_preemptions=1,
        num_steps=9,
        last_step_tokens=17,
    )


def test_engine_statistics_are_exported(server: Server) -> None:
    assert metric(server, "aerie:num_requests_running") == 0
    server.engine.stats = stats(10)
    expected = {
        "aerie:num_requests_running": 3,
        "aerie:num_requests_waiting": 2,
        "aerie:kv_cache_usage_perc": 0.25,
        "aerie:prefix_cache_queries_total": 20,
        "aerie:prefix_cache_hits_total": 10,
        "aerie:num_preemptions_total": 1,
        "aerie:iteration_tokens": 17,
    }
    assert {name: metric(server, name) for name in expected} == expected


def test_counters_go_on_when_the_engine_starts_again(server: Server) -> None:
    seen = []
    for hits in (10, 12, 3, 3, 5, 0, 4):
        server.engine.stats = stats(hits)
        seen.append(metric(server, "aerie:prefix_cache_hits_total"))
    assert seen == [10, 12, 15, 15, 17, 17, 21]
    server.engine.info = None
    assert metric(server, "aerie:num_requests_running") == 0
    assert metric(server, "aerie:prefix_cache_hits_total") == 21


def test_counters_stay_until_the_next_engine_sends_statistics(server: Server) -> None:
    """Nothing was scraped while the first engine lived."""
    client = ZmqEngineClient()
    metrics = Metrics(client, "tiny", CacheConfig())
    client._take(INFO)
    client._take(stats(10))
    client.detach()
    found = []
    for message in (None, INFO, stats(0, running=5)):
        if message is not None:
            client._take(message)
        lines = metrics.render().decode().splitlines()
        wanted = ("aerie:prefix", "aerie:num_requests_running", "aerie:num_requests_waiting{")
        counts = [line for line in lines if line.startswith(wanted)]
        found.append([float(line.rpartition(" ")[2]) for line in counts])
    client.close()
    assert found == [[0, 0, 20, 10], [0, 0, 20, 10], [5, 2, 20, 10]]


def test_requests_are_counted_and_timed(server: Server) -> None:
    server.chat(n=2)
    server.chat(max_tokens=1)
    num_tokens = 2 * (len(server.ids("hello there")) + 1) + 1
    num_prompt = sum(len(request.prompt_ids) for request in server.engine.submitted)
    expected = {
        "aerie:prompt_tokens_total": num_prompt,
        "aerie:generation_tokens_total": num_tokens,
        'aerie:request_success_total{finished_reason="stop",model_name="tiny"}': 2,
        'aerie:request_success_total{finished_reason="length",model_name="tiny"}': 1,
        'aerie:request_success_total{finished_reason="abort",model_name="tiny"}': 0,
        "aerie:time_to_first_token_seconds_count": 3,
        "aerie:inter_token_latency_seconds_count": num_tokens - 3,
        "aerie:e2e_request_latency_seconds_count": 3,
        "aerie:request_queue_time_seconds_sum": 0.75,
        "aerie:request_prefill_time_seconds_sum": 0.75,
        "aerie:request_decode_time_seconds_count": 3,
    }
    text = server.get("/metrics").text
    found = {}
    for name in expected:
        lines = [line for line in text.splitlines() if line.startswith(name)]
        found[name] = round(float(lines[0].rpartition(" ")[2]), 3)
    assert found == expected


def test_two_applications_do_not_share_metrics(make_server: MakeServer) -> None:
    first, second = make_server(), make_server()
    first.chat()
    assert metric(second, "aerie:prompt_tokens_total") == 0


def test_log_lines_cannot_be_forged(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    server.get("/a%0Ab status=200", headers={"x-request-id": "a status=1"})
    (record,) = [r for r in caplog.records if r.name == "server.http.middleware.request_log"]
    message = record.getMessage()
    assert "\n" not in message
    assert 'request_id="a status=1"' in message


@pytest.mark.parametrize("prompts", [False, True])
def test_errors_in_the_log_quote_the_client_only_on_request(
    make_server: MakeServer, caplog: pytest.LogCaptureFixture, prompts: bool
) -> None:
    caplog.set_level(logging.INFO)
    make_server(log_prompts=prompts).chat(messages=[{"role": "private", "content": ""}])
    assert ("private" in caplog.text) == prompts
    assert "messages[0].role" in caplog.text


def test_waiting_for_idle_returns_at_once_when_nothing_is_open(server: Server) -> None:
    asyncio.run(server.context.state.wait_idle())


def test_the_http_process_imports_no_model_code() -> None:
    forbidden = ("torch", "transformers", "triton", "kernels", "drafter")
    program = (
        "import sys, server.http.app, server.openai.routes, server.text.tokens.tokenizer_files;"
        f"print(sorted(set({forbidden!r}) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")
