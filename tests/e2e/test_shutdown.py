"""SIGTERM: open requests complete, new ones are refused, the exit code is 0."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from tests.e2e.conftest import MAX_LEN, MODEL
from tests.support.servers.live_server import LiveServer, idle, post, wait_gone
from tests.support.waiting import DEADLINE

MakeServer = Callable[..., LiveServer]
LENGTH = 3000  # tokens; they take much longer than the test needs to stop the engine
DRAINING = r"draining: 1 requests are open"


def open_stream(server: LiveServer, num_tokens: int, **client: Any) -> openai.Stream[Any]:
    """A stream of `num_tokens` whose first token has arrived."""
    stream = server.client(**client).completions.create(
        model=MODEL,
        prompt="the lazy dog",
        max_tokens=num_tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    return stream


def test_sigterm_lets_open_streams_end_and_refuses_new_requests(make_server: MakeServer) -> None:
    with make_server("server.drain_timeout=140") as server:
        engine = server.engine_pid
        stream = open_stream(server, LENGTH)
        os.kill(engine, signal.SIGSTOP)  # until everything else has been looked at
        server.signal(signal.SIGTERM)
        server.log.wait_for(DRAINING)
        with pytest.raises(openai.InternalServerError) as caught:
            server.client().completions.create(model=MODEL, prompt="late", max_tokens=1)
        assert (caught.value.status_code, caught.value.code) == (503, "draining")
        assert caught.value.response.headers["retry-after"] == "1"
        assert server.get("/ready").status_code == 503
        assert server.get("/health").status_code == 200
        os.kill(engine, signal.SIGCONT)
        *_, last = stream
        assert last.usage.completion_tokens == LENGTH
        assert server.wait() == 0


@pytest.mark.parametrize(
    "second", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.extended)]
)
def test_a_second_signal_ends_open_streams_with_an_error(
    make_server: MakeServer, second: signal.Signals
) -> None:
    with make_server() as server:
        stream = open_stream(server, MAX_LEN - 100)
        server.signal(signal.SIGTERM)
        server.log.wait_for(DRAINING)
        server.signal(second)
        with pytest.raises(openai.APIError, match="shutting down") as caught:
            list(stream)
        assert (caught.value.type, caught.value.code) == ("unavailable_error", "draining")
        assert server.wait() == 0


def test_without_time_to_drain_open_requests_end_with_an_error(make_server: MakeServer) -> None:
    with make_server("server.drain_timeout=0") as server, ThreadPoolExecutor(1) as threads:
        stream = open_stream(server, MAX_LEN - 100)
        fields = {"model": MODEL, "prompt": "a", "max_tokens": MAX_LEN - 100, "ignore_eos": True}
        whole = threads.submit(server.post, "/v1/completions", fields)
        server.wait_metrics(lambda found: found["num_requests_running"] == 2)
        server.signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="shutting down") as caught:
            list(stream)
        assert (caught.value.type, caught.value.code) == ("unavailable_error", "draining")
        assert whole.result().status_code == 503
        assert whole.result().json()["error"]["code"] == "draining"
        assert server.wait() == 0
        assert "Traceback" not in server.log.text()


def test_a_client_that_does_not_read_cannot_hold_up_the_end(make_server: MakeServer) -> None:
    with make_server("server.drain_timeout=0", f"server.write_timeout={DEADLINE}") as server:
        body = json.dumps(
            {
                "model": MODEL,
                "prompt": "the lazy dog",
                "max_tokens": 1300,
                "n": 3,
                "stream": True,
                "ignore_eos": True,
                "logprobs": 20,
            }
        ).encode()
        with post(server.url, "/v1/completions", body):
            found = server.wait_metrics(lambda now: now["iterations_total"] >= 1300 and idle(now))
            assert found["generation_tokens_total"] < 3900, "it must be stuck in sending"
            assert server.stop() == 0
        assert "Traceback" not in server.log.text()


def test_ctrl_c_while_the_model_loads_ends_both_processes_quietly(make_server: MakeServer) -> None:
    """A terminal sends it to the whole process group, in which the engine must not be."""
    with make_server(wait=False) as server:
        server.log.wait_for("startup complete")
        engine = os.pidfd_open(server.engine_pid)
        assert os.getpgid(server.engine_pid) != os.getpgid(server.pid)
        server.signal(signal.SIGINT)
        assert server.wait() == 0
        wait_gone(engine)
        assert "Traceback" not in server.log.text()


def test_sigterm_while_the_model_loads_ends_the_server(make_server: MakeServer) -> None:
    with make_server(wait=False) as server:
        server.log.wait_for("startup complete")
        assert server.stop() == 0
        assert "Traceback" not in server.log.text()
