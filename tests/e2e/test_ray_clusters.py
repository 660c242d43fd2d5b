"""`aerie deploy ray` and `serve run`: tests with a cluster of their own. `make test-ray`

They are not in test_ray.py because its fleet lives until the last test of the file: two clusters at
a time are too many for small machines.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import httpx
import pytest
import yaml

from benchmarks.peers.running import free_port
from tests.architecture.source_tree import ROOT
from tests.e2e.conftest import MODEL
from tests.support.servers.live_fleet import RAY_SETTINGS, LiveFleet
from tests.support.servers.live_server import LiveServer, child_environment
from tests.support.waiting import DEADLINE

pytest.importorskip("ray", reason="the extra `ray` is not installed")

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]
MakeFleet = Callable[..., LiveFleet]
LONG = 1500  # times two tokens: the engine, and nothing before it, must be what requests wait for
NUM_WITH_BOTH = 48  # requests: four of each client


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


def test_affinity_finds_more_of_prompts_in_the_caches_than_turns(make_fleet: MakeFleet) -> None:
    """Three conversations over two engines whose caches hold two of them each."""
    rates = {}
    for routing in ("prefix", "round_robin"):
        options = ("fleet.replicas=2", f"fleet.routing={routing}", "cache.num_blocks=90")
        with make_fleet(*options, "model.max_model_len=1024") as live:
            rates[routing] = hit_rate(live, prefixes=3, rounds=6)
            assert live.stop() == 0
    assert rates["prefix"] > 0.8
    assert rates["round_robin"] < 0.5


def test_serve_run_takes_the_same_application_from_a_file(
    make_fleet: MakeFleet, tmp_path: Path
) -> None:
    content = yaml.safe_load((ROOT / "configs/deploy/ray/serve.yaml").read_text(encoding="utf-8"))
    port = free_port()
    content["http_options"]["port"] = port
    keys = dict(each.split("=", 1) for each in make_fleet().overrides)
    content["applications"][0]["args"] = keys | {"replicas": "1"}
    path = tmp_path / "serve.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    extra = RAY_SETTINGS | {"RAY_ADDRESS": "local", "PYTHONPATH": str(ROOT)}
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
        try:
            process.wait(DEADLINE)
        finally:
            process.kill()


def is_ready(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/ready", verify=False).status_code == 200
    except httpx.HTTPError:
        return False


def test_engines_come_and_go_with_the_load_and_no_request_fails(make_fleet: MakeFleet) -> None:
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
            prompt = [10 + number, 30 + count % 300] * LONG
            found = client.completions.create(model=MODEL, prompt=prompt, max_tokens=1)
            assert found.usage is not None
            assert found.usage.completion_tokens == 1
            count += 1
        return count

    with make_fleet(*options) as live, ThreadPoolExecutor(12) as threads:
        client = live.client()
        live.wait_engines(1)  # before the load: a slow look would come when there are two
        asking = [threads.submit(keep_asking, number) for number in range(12)]
        try:
            live.wait_engines(2)
            before = live.metrics()["request_success_total"]
            live.wait_metrics(lambda now: now["request_success_total"] > before + NUM_WITH_BOTH)
            busy.set()
            live.wait_engines(1)
        finally:
            busy.set()
            ended.set()
        assert all(one.result() > 0 for one in asking)
        assert live.stop() == 0
