"""`aerie deploy ray` on this machine: several engines behind one API. `make test-ray`"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import httpx
import openai
import pytest
import yaml

from benchmarks.peers.running import free_port
from server.process.supervision.process_table import children_of
from tests.architecture.source_tree import ROOT
from tests.e2e.conftest import MAX_LEN, MODEL
from tests.support.heads.tiny_heads import write_tiny_head
from tests.support.models.tiny_llama import TinyLlama
from tests.support.servers.live_server import (
    LiveServer,
    child_environment,
    command_line,
)
from tests.support.waiting import DEADLINE, wait_until

pytest.importorskip("ray", reason="the extra `ray` is not installed")

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]
MakeServer = Callable[..., LiveServer]
FULL = {"ignore_eos": True}
ADMIN = {"authorization": "Bearer root"}
QUICK = {
    # Ray pushes loads every ten seconds otherwise.
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.5",
    "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.5",
    "RAY_AUTH_MODE": "disabled",
}


class LiveFleet(LiveServer):
    """`aerie deploy ray` on a free port."""

    def __init__(self, *overrides: str, **options: Any) -> None:
        super().__init__(*overrides, extra=QUICK, **options)
        self._arguments = ["deploy", "ray", "--port", "0", *overrides]

    @property
    def engine_pids(self) -> list[int]:
        return [pid for pid in descendants(self.pid) if "engine_process" in command_line(pid)]

    def wait_engines(self, number: int) -> list[int]:
        """Wait until so many engines run, and all of them can take requests."""
        end = time.monotonic() + DEADLINE
        while len(found := self.engine_pids) != number:
            assert time.monotonic() < end, f"{len(found)} engines run, not {number}"
            time.sleep(0.05)
        return found


def descendants(pid: int) -> Iterator[int]:
    for child in children_of(pid):
        yield child
        yield from descendants(child)


@pytest.fixture(scope="module")
def make_fleet(make_server: MakeServer) -> MakeServer:
    """Builds fleets on the tiny model; arguments are those of `LiveServer`."""

    def make(*overrides: str, **options: Any) -> LiveFleet:
        return LiveFleet(*make_server().overrides, *overrides, **options)

    return make


@pytest.fixture(scope="module")
def fleet(make_fleet: MakeServer) -> Iterator[LiveFleet]:
    """Two engines; tests that end one wait for the next."""
    with make_fleet("fleet.replicas=2", "server.admin_keys=[root]") as live:
        assert isinstance(live, LiveFleet)
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


def hit_rate(server: LiveServer, prefixes: int, rounds: int) -> float:
    """Share of prompt tokens found in the caches, with `prefixes` conversations that take turns."""
    before = server.metrics()
    client = server.client()
    for number in range(rounds):
        for prefix in range(prefixes):
            client.completions.create(
                model=MODEL,
                prompt=[10 + prefix] * 640 + [5, 6, 7 + number],
                max_tokens=1,
            )
    found = server.wait_metrics(
        lambda now: (
            now["prompt_tokens_total"] - before["prompt_tokens_total"] == rounds * prefixes * 643
        )
    )
    return (found["prompt_tokens_cached_total"] - before["prompt_tokens_cached_total"]) / (
        rounds * prefixes * 643
    )


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
    with httpx.stream("POST", f"{fleet.url}/v1/completions", json=body, verify=False) as answer:
        next(answer.iter_lines())
    fleet.wait_metrics(lambda now: now["ended_abort"] == ended + 1)
    fleet.wait_metrics(lambda now: now["num_requests_running"] == 0)


def test_affinity_finds_more_of_prompts_in_the_caches_than_turns(make_fleet: MakeServer) -> None:
    """Three conversations over two engines whose caches hold two of them each."""
    rates = {}
    for routing in ("prefix", "round_robin"):
        options = ("fleet.replicas=2", f"fleet.routing={routing}", "cache.num_blocks=90")
        with make_fleet(*options, "model.max_model_len=1024") as live:
            rates[routing] = hit_rate(live, prefixes=3, rounds=6)
            assert live.stop() == 0
    assert rates["prefix"] > 0.8
    assert rates["round_robin"] < 0.5


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


def test_serve_run_takes_the_same_application_from_a_file(
    make_fleet: MakeServer, tmp_path: Path
) -> None:
    content = yaml.safe_load((ROOT / "configs/deploy/ray/serve.yaml").read_text(encoding="utf-8"))
    port = free_port()
    content["http_options"]["port"] = port
    keys = dict(each.split("=", 1) for each in make_fleet().overrides)
    content["applications"][0]["args"] = keys | {"replicas": "1"}
    path = tmp_path / "serve.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    extra = QUICK | {"RAY_ADDRESS": "local", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", "from ray.serve.scripts import cli; cli()", "run", str(path)],
        env=child_environment(extra),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        end = time.monotonic() + DEADLINE
        while not is_ready(port):
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.2)
        body = {"model": MODEL, "prompt": "a", "max_tokens": 3}
        url = f"http://127.0.0.1:{port}/v1/completions"
        answer = httpx.post(url, json=body, verify=False, timeout=DEADLINE)
        assert answer.json()["object"] == "text_completion"
    finally:
        process.terminate()
        process.wait(DEADLINE)


def is_ready(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/ready", verify=False).status_code == 200
    except httpx.HTTPError:
        return False


def test_engines_come_and_go_with_the_load_and_no_request_fails(make_fleet: MakeServer) -> None:
    options = (
        "fleet.max_replicas=2",
        "fleet.scale_up_delay=0.5",
        "fleet.scale_down_delay=3",
        "fleet.load_window=11",
        "fleet.waiting_target=2",
        "scheduler.max_num_seqs=2",
    )
    busy, ended = Event(), Event()

    def keep_asking(number: int) -> int:
        """Requests answered until the load may end; the first client goes on to the end."""
        count = 0
        while not (ended if number == 0 else busy).is_set():
            found = client.completions.create(
                model=MODEL, prompt=f"{number} {count}", max_tokens=100, extra_body=FULL
            )
            assert found.choices[0].finish_reason == "length"
            count += 1
        return count

    with make_fleet(*options) as live, ThreadPoolExecutor(12) as threads:
        assert isinstance(live, LiveFleet)
        client = live.client()
        asking = [threads.submit(keep_asking, number) for number in range(12)]
        try:
            live.wait_engines(1)
            live.wait_engines(2)
            time.sleep(3)  # with both engines
            busy.set()
            live.wait_engines(1)
        finally:
            busy.set()
            ended.set()
        assert all(one.result() > 0 for one in asking)
        assert live.stop() == 0
