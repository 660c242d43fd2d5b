"""What clients see when one process is killed, and what happens to the other process."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.e2e.conftest import MAX_LEN, MODEL
from tests.support.servers.live_server import LiveServer, wait_gone
from tests.support.servers.start_up import holding_engines

MakeServer = Callable[..., LiveServer]
SHORT: dict[str, Any] = {"model": MODEL, "prompt": "the quick", "max_tokens": 8, "temperature": 0}
PATIENCE = "server.engine_timeout=10"  # seconds; a busy machine takes some for a step
ENDLESS = SHORT | {"max_tokens": MAX_LEN - 100, "extra_body": {"ignore_eos": True}}


def text_of(server: LiveServer) -> str:
    return str(server.client().completions.create(**SHORT).choices[0].text)


def check_failure_of_open_requests(
    server: LiveServer, cause: signal.Signals = signal.SIGKILL
) -> None:
    """Kill or stop the engine during a streamed and a whole answer."""
    client = server.client()
    with ThreadPoolExecutor(1) as threads:
        stream = client.completions.create(**ENDLESS, stream=True)
        next(iter(stream))
        whole = threads.submit(client.completions.create, **ENDLESS)
        server.wait_metrics(lambda found: found["num_requests_running"] == 2)
        os.kill(server.engine_pid, cause)
        with pytest.raises(openai.APIError, match="failed to finish"):
            list(stream)
        with pytest.raises(openai.InternalServerError) as caught:
            whole.result()
    assert (caught.value.status_code, caught.value.code) == (500, "internal_error")


def check_refusal_of_what_ran_at_two_deaths(server: LiveServer, before: str) -> None:
    """`check_failure_of_open_requests` has sent the same requests before the first death."""
    check_failure_of_open_requests(server)
    server.wait_status("/ready", 200)
    with pytest.raises(openai.BadRequestError, match="both times when the engine") as caught:
        server.client().completions.create(**ENDLESS)
    assert caught.value.code == "request_refused"
    assert "running at two deaths of the engine in a row" in server.log.text()
    assert text_of(server) == before


def test_a_killed_engine_is_started_again_and_a_killed_server_takes_its_engine_along(
    make_server: MakeServer, tmp_path: Path
) -> None:
    hold = tmp_path / "hold"
    with make_server(extra=holding_engines(tmp_path, hold)) as server:
        before, first_pid = text_of(server), server.engine_pid
        hold.touch()
        check_failure_of_open_requests(server)
        assert server.get("/ready").status_code == 503
        assert server.get("/health").status_code == 200
        with pytest.raises(openai.InternalServerError) as caught:
            text_of(server)
        assert (caught.value.status_code, caught.value.code) == (503, "engine_not_ready")
        assert "retry-after" in caught.value.response.headers
        hold.unlink()
        server.wait_status("/ready", 200)
        assert server.engine_pid != first_pid
        assert text_of(server) == before
        found = server.metrics()
        assert (found["request_success_total"], found["engine_restarts_total"]) == (4, 1)
        check_refusal_of_what_ran_at_two_deaths(server, before)
        busy = server.client().completions.create(**ENDLESS | {"prompt": "a"}, stream=True)
        next(iter(busy))
        engine = os.pidfd_open(server.engine_pid)
        server.signal(signal.SIGKILL)
        assert server.wait() == -signal.SIGKILL
        wait_gone(engine)
        busy.close()


def test_an_engine_that_hangs_is_killed_and_without_restarts_the_server_ends_with_it(
    make_server: MakeServer,
) -> None:
    with make_server("server.restart_engine=false", PATIENCE) as server:
        check_failure_of_open_requests(server, signal.SIGSTOP)
        assert server.wait() == 1
        assert "has work and has sent nothing for" in server.log.text()
        assert "the engine process ended with exit code -9" in server.log.text()
