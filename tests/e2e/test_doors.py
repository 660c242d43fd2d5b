"""Keys, limits, logs and facts, over real sockets."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest

from tests.e2e.conftest import MAX_LEN, MODEL, NUM_BLOCKS
from tests.support.servers.live_server import LiveServer, idle
from tests.support.waiting import DEADLINE

KEY, FILE_KEY = "sk-first-secret", "sk-second-secret"
MAX_BODY = 20_000
SHORT: dict[str, Any] = {"model": MODEL, "prompt": "the quick", "max_tokens": 4, "temperature": 0}
ENDLESS = SHORT | {"max_tokens": MAX_LEN - 100, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def guarded(
    make_server: Callable[..., LiveServer], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveServer]:
    """A server with keys and a JSON log, where one request runs and one may wait."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(f"# ours\n{FILE_KEY}\n")
    with make_server(
        f"server.api_keys=[{KEY}]",
        f"server.api_key_file={keys}",
        "server.max_queued_requests=1",
        "scheduler.max_num_seqs=1",
        f"server.max_body_bytes={MAX_BODY}",
        "log.format=json",
    ) as live:
        yield live
        assert live.stop() == 0


def bearer(key: str = KEY) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.mark.parametrize("key", [KEY, FILE_KEY])
def test_each_key_opens(guarded: LiveServer, key: str) -> None:
    assert guarded.client(api_key=key).completions.create(**SHORT).usage.completion_tokens > 0


def test_a_wrong_key_is_an_authentication_error(guarded: LiveServer) -> None:
    with pytest.raises(openai.AuthenticationError) as caught:
        guarded.client(api_key="sk-wrong").completions.create(**SHORT)
    assert caught.value.code == "invalid_api_key"


def test_probes_need_no_key(guarded: LiveServer) -> None:
    statuses = {path: guarded.get(path).status_code for path in ("/health", "/ready", "/metrics")}
    assert set(statuses.values()) == {200}
    assert guarded.get("/info").status_code == 401


@pytest.mark.parametrize("announced", [True, False], ids=["announced", "chunked"])
def test_a_body_above_the_limit_is_413(guarded: LiveServer, announced: bool) -> None:
    body = json.dumps(SHORT | {"prompt": "x" * MAX_BODY}).encode()
    content = body if announced else iter([body[:100], body[100:]])
    headers = bearer() | {"content-type": "application/json"}
    response = guarded.request("POST", "/v1/completions", content=content, headers=headers)
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "request_too_large"


def test_facts_show_what_was_settled_and_no_secret(guarded: LiveServer) -> None:
    response = guarded.get("/info", headers=bearer())
    facts = response.json()
    assert facts["config"]["cache"]["num_blocks"] == facts["engine"]["num_blocks"] == NUM_BLOCKS
    assert facts["config"]["model"]["max_model_len"] == MAX_LEN
    assert facts["engine"]["ops"] == guarded.resolved["ops"]
    assert facts["config"] == guarded.resolved["config"]
    for text in (response.text, guarded.out.text()):
        assert KEY not in text
        assert FILE_KEY not in text


def test_a_full_queue_refuses_until_there_is_room(guarded: LiveServer) -> None:
    client = guarded.client(api_key=KEY)
    with ThreadPoolExecutor(2) as threads:
        running = client.completions.create(**ENDLESS, stream=True)
        next(iter(running))  # it has left the queue
        waiting = threads.submit(client.completions.create, **SHORT)
        guarded.wait_metrics(lambda found: found["num_requests_waiting"] == 1)
        with pytest.raises(openai.RateLimitError) as caught:
            client.completions.create(**SHORT)
        assert caught.value.response.headers["retry-after"] == "1"
        refused = guarded.metrics()["admission_rejections_total"]
        patient = client.with_options(max_retries=20)
        retrying = threads.submit(patient.completions.create, **SHORT)
        guarded.wait_metrics(lambda found: found["admission_rejections_total"] > refused)
        running.close()
        assert retrying.result().choices == waiting.result().choices
    guarded.wait_metrics(idle)


@pytest.mark.parametrize("path", ["/v1/completions", "/nowhere"])
def test_a_request_id_comes_back_and_is_in_the_log(guarded: LiveServer, path: str) -> None:
    wanted = f"trace-of{path.replace('/', '-')}"
    response = guarded.post(path, SHORT, headers=bearer() | {"x-request-id": wanted})
    assert response.headers["x-request-id"] == wanted
    assert guarded.log.wait_for(wanted) is not None


def test_the_log_is_json_and_tells_no_text_and_no_key(guarded: LiveServer) -> None:
    fields = SHORT | {"prompt": "very private words", "max_tokens": 40}
    headers = bearer() | {"x-request-id": "private-request"}
    reply = guarded.post("/v1/completions", fields, headers=headers).json()
    guarded.log.wait_for("private-request")
    text = guarded.log.text()
    entries = [json.loads(line) for line in text.splitlines()]
    (entry,) = [e for e in entries if e.get("request_id") == "private-request"]
    usage = reply["usage"]
    assert (entry["event"], entry["status"]) == ("request", 200)
    assert (entry["prompt_tokens"], entry["output_tokens"]) == (
        usage["prompt_tokens"],
        usage["completion_tokens"],
    )
    output = json.dumps(reply["choices"][0]["text"])[1:-1]
    for secret in ("private words", output, KEY, FILE_KEY):
        assert secret not in text


def test_the_plain_log_tells_no_text_either(server: LiveServer) -> None:
    wanted = {"x-request-id": "plain-private"}
    fields = SHORT | {"prompt": "very private words", "max_tokens": 40}
    text = server.post("/v1/completions", fields, headers=wanted).json()["choices"][0]["text"]
    match = server.log.wait_for(r".*request_id=plain-private.*")
    assert match is not None
    assert "status=200" in match[0]
    for secret in ("private words", text):
        assert secret not in server.log.text()


def test_endless_headers_cost_only_their_connection(guarded: LiveServer) -> None:
    address = urlsplit(guarded.url)
    with socket.create_connection((address.hostname, address.port), DEADLINE) as flood:
        flood.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-A: ")
        with pytest.raises(ConnectionError):
            flood.sendall(b"a" * 2**28)
    assert guarded.get("/health").status_code == 200


def test_what_is_not_http_is_answered_in_json(guarded: LiveServer) -> None:
    address = urlsplit(guarded.url)
    with socket.create_connection((address.hostname, address.port), DEADLINE) as line:
        line.sendall(b"NONSENSE / HTTP/1.1\r\n\r\n")
        head, _, body = b"".join(iter(lambda: line.recv(4096), b"")).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert b"x-request-id: req_" in head
    assert json.loads(body)["error"]["code"] == "invalid_http"


def test_secrets_are_not_on_the_command_line_of_the_engine(guarded: LiveServer) -> None:
    arguments = Path(f"/proc/{guarded.engine_pid}/cmdline").read_bytes().decode()
    assert "secret" not in arguments
