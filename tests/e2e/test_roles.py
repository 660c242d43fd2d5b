"""Engines for prompts and engines for decoding give the texts of one engine that does both."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from server.process.supervision.process_table import children_of
from tests.e2e.conftest import MAX_LEN, MODEL
from tests.support.heads.tiny_heads import write_tiny_head
from tests.support.models.tiny_llama import TinyLlama
from tests.support.servers.live_server import LiveServer, command_line, idle

pytestmark = pytest.mark.extended

MakeServer = Callable[..., LiveServer]
LONG = "the quick brown fox jumps over the lazy dog " * 12
SEVERAL = {"n": 3, "temperature": 1.0, "seed": 5}
PENALTIES = {"frequency_penalty": 0.5, "presence_penalty": 0.5, "repetition_penalty": 1.2}
BODIES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "sampled": {"seed": 3, "top_p": 0.9},
    "choices": SEVERAL,
    "penalties": PENALTIES | {"seed": 1},
    "logprobs": {"logprobs": 2, "seed": 4},
    "echo": {"echo": True, "logprobs": 1, "temperature": 0},
    "bias": {"logit_bias": {"300": 5}, "min_tokens": 6, "seed": 2},
    "stop": {"stop": ["a", "e"], "seed": 6},
    "one token": {"max_tokens": 1, "temperature": 0},
    "grammar": {"structured_outputs": {"regex": "[a-f]{3,40}"}, "seed": 7},
    "short": {"prompt": "the quick", "temperature": 0},
}


def body_of(name: str) -> dict[str, Any]:
    return {"model": MODEL, "prompt": f"{name} {LONG}", "max_tokens": 24} | BODIES[name]


def answer(server: LiveServer, name: str) -> Any:
    found = server.post("/v1/completions", body_of(name)).json()
    assert "choices" in found, found
    return [
        (choice["text"], choice["finish_reason"], choice["logprobs"]) for choice in found["choices"]
    ]


def all_answers(server: LiveServer) -> dict[str, Any]:
    """Those to all bodies, which run at the same time."""
    with ThreadPoolExecutor(len(BODIES)) as threads:
        return dict(zip(BODIES, threads.map(partial(answer, server), BODIES), strict=True))


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = TinyLlama(max_position_embeddings=MAX_LEN)
    return write_tiny_head(tmp_path_factory.mktemp("heads") / "head", spec)


@pytest.fixture(scope="module")
def settings(head: Path) -> tuple[str, ...]:
    return (f"speculation.draft={head}", "speculation.tree=chain3")


@pytest.fixture(
    scope="module", params=["shared_memory", pytest.param("nixl", marks=pytest.mark.nixl)]
)
def roles(
    request: pytest.FixtureRequest, make_server: MakeServer, settings: tuple[str, ...]
) -> Iterator[LiveServer]:
    if request.param == "nixl":
        pytest.importorskip("nixl", reason="the extra `nixl` is not installed")
    transfer = f"parallel.transfer={request.param}"
    with make_server("parallel.roles=prefill:1,decode:1", transfer, *settings) as live:
        yield live
        assert live.stop() == 0


@pytest.fixture(scope="module")
def expected(make_server: MakeServer, settings: tuple[str, ...]) -> dict[str, Any]:
    with make_server(*settings) as live:
        return all_answers(live)


def engines(server: LiveServer) -> dict[str, int]:
    """The process of each role."""
    found = {}
    for pid in children_of(server.http_pid):
        for role in ("prefill", "decode"):
            if f'"kind":"{role}"' in command_line(pid):
                found[role] = pid
    return found


def test_every_feature_has_the_text_of_one_engine(
    roles: LiveServer, expected: dict[str, Any]
) -> None:
    assert all_answers(roles) == expected
    roles.wait_metrics(idle)
    assert all_answers(roles) == expected  # with warm prefix caches


@pytest.mark.parametrize("role", ["decode", "prefill"])
def test_a_lost_engine_loses_no_request(roles: LiveServer, role: str) -> None:
    body = {"model": MODEL, "prompt": LONG, "max_tokens": 1500, "ignore_eos": True, "seed": 8}
    whole = roles.post("/v1/completions", body).json()
    with ThreadPoolExecutor(1) as threads:
        before = roles.metrics()["generation_tokens_total"]
        answers = threads.submit(roles.post, "/v1/completions", body)
        roles.wait_metrics(lambda found: found["generation_tokens_total"] > before + 20)
        os.kill(engines(roles)[role], signal.SIGKILL)
        found = answers.result().json()
    assert found["choices"] == whole["choices"]
    assert found["usage"]["completion_tokens"] == 1500
    assert roles.get("/ready").status_code == 200
    assert roles.post("/v1/completions", body).json()["choices"] == whole["choices"]
