"""`aerie deploy ray` on this machine: two engines that share one API. `make test-ray`"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import httpx
import openai
import pytest

from server.process.supervision.process_table import children_of
from tests.e2e.conftest import MAX_LEN, MODEL
from tests.support.heads.tiny_heads import write_tiny_head
from tests.support.models.tiny_llama import TinyLlama
from tests.support.servers.live_fleet import LiveFleet
from tests.support.servers.live_server import LiveServer, descendants
from tests.support.waiting import DEADLINE, wait_until

pytest.importorskip("ray", reason="the extra `ray` is not installed")

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]
ADMIN = {"authorization": "Bearer root"}


@pytest.fixture(scope="module")
def fleet(make_fleet: Callable[..., LiveFleet]) -> Iterator[LiveFleet]:
    """Two engines; tests that end one wait for the next."""
    with make_fleet("fleet.replicas=2", "server.admin_keys=[root]") as live:
        live.wait_engines(2)
        yield live
        assert live.stop() == 0


def asked(number: int) -> dict[str, Any]:
    return {
        "model": MODEL,
        "prompt": ("the quick brown fox " * 8 if number % 2 else "") + f"number {number}",
        "max_tokens": 60,
        "temperature": number % 3 / 2,
        "seed": number,
        "stop": ["<nothing>"],
        "extra_body": {"ignore_eos": True},
    }


def texts(server: LiveServer) -> list[str]:
    """The texts of requests sent together; every second one is streamed."""
    client = server.client()

    def text(number: int) -> str:
        if number % 4 > 1:
            chunks = client.completions.create(**asked(number), stream=True)
            return "".join(chunk.choices[0].text for chunk in chunks)
        return client.completions.create(**asked(number)).choices[0].text

    with ThreadPoolExecutor(8) as threads:
        return list(threads.map(text, range(24)))


def _heard(chunk: Any, event: Event) -> str | None:
    event.set()
    reason: str | None = chunk.choices[0].finish_reason
    return reason


def test_two_engines_give_the_texts_of_one_server(fleet: LiveFleet, server: LiveServer) -> None:
    assert texts(fleet) == texts(server)
    fleet.wait_metrics(lambda now: now["num_requests_running"] == 0)


def test_bad_requests_are_answered_as_by_one_server(fleet: LiveFleet, server: LiveServer) -> None:
    for body in ({}, {"prompt": 5}, {"model": "x", "prompt": "a"}, {"model": MODEL, "n": 1e9}):
        answers = [each.post("/v1/completions", body) for each in (fleet, server)]
        assert answers[0].status_code == answers[1].status_code
        assert answers[0].json() == answers[1].json()


def test_a_client_that_leaves_ends_its_request(fleet: LiveFleet) -> None:
    ended = fleet.metrics()["ended_abort"]
    body = {"model": MODEL, "prompt": "a", "max_tokens": 8000, "stream": True, "ignore_eos": True}
    url = f"{fleet.url}/v1/completions"
    with httpx.stream("POST", url, json=body, verify=False, timeout=DEADLINE) as answer:
        next(answer.iter_lines())
    fleet.wait_metrics(lambda now: now["ended_abort"] == ended + 1)
    fleet.wait_metrics(lambda now: now["num_requests_running"] == 0)


def test_a_killed_engine_loses_its_open_requests_only(fleet: LiveFleet) -> None:
    engines = fleet.wait_engines(2)
    client = fleet.client()
    streaming = [Event() for _ in range(6)]

    def read(number: int) -> bool:
        """Whether the stream came to its end."""
        stream = client.completions.create(
            model=MODEL,
            prompt=f"number {number}",
            max_tokens=3000,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        try:
            reasons = [_heard(chunk, streaming[number]) for chunk in stream]
        except openai.APIError as error:
            return "failed to finish this request" not in str(error)
        return reasons[-1] == "length"

    with ThreadPoolExecutor(6) as threads:
        reading = [threads.submit(read, number) for number in range(6)]
        for event in streaming:
            assert event.wait(DEADLINE)
        (replica,) = (pid for pid in descendants(fleet.pid) if engines[0] in children_of(pid))
        os.kill(engines[0], signal.SIGKILL)
        wait_until(lambda: replica not in descendants(fleet.pid))  # till then it may get requests
        after = client.completions.create(model=MODEL, prompt="after", max_tokens=5)
        assert after.choices[0].finish_reason in ("length", "stop")
        assert sorted(one.result() for one in reading) == [False] * 3 + [True] * 3
    assert set(fleet.wait_engines(2)) != set(engines)
    assert fleet.get("/ready").status_code == 200


def test_ready_says_when_no_engine_is(fleet: LiveFleet) -> None:
    for engine in fleet.wait_engines(2):
        os.kill(engine, signal.SIGKILL)
    assert fleet.wait_status("/ready", 503).json()["error"]["code"] == "engine_not_ready"
    assert fleet.get("/health").status_code == 200
    fleet.wait_status("/ready", 200)
    fleet.wait_engines(2)


def test_a_head_is_swapped_in_all_engines_also_in_those_that_start_later(
    fleet: LiveFleet, tmp_path: Path
) -> None:
    head = write_tiny_head(tmp_path / "head", TinyLlama(max_position_embeddings=MAX_LEN))
    refused = fleet.post("/admin/draft", {"path": str(tmp_path / "none")}, headers=ADMIN)
    assert refused.status_code == 400
    swapped = fleet.post("/admin/draft", {"path": str(head)}, headers=ADMIN)
    assert swapped.json()["draft"]["path"] == str(head)
    assert fleet.get("/info").json()["engine"]["draft"]["path"] == str(head)
    old = fleet.wait_engines(2)
    os.kill(old[0], signal.SIGKILL)
    fleet.log.wait_for(f"all 2 engines draft with {head}")
    os.kill(old[1], signal.SIGKILL)  # the other one has it from its front end only
    fleet.wait_status("/ready", 200)
    assert fleet.get("/info").json()["engine"]["draft"]["path"] == str(head)
