"""Streamed completions become times, texts and counts of tokens."""

from __future__ import annotations

import asyncio
import json

import pytest

from benchmarks.peers.openai_url import UrlTarget
from server.measuring.answers import Answer, Endpoint, Stopless, ask_all
from tests.support.servers.scripted_server import NO_USAGE, REFUSAL, USAGE, scripted


@pytest.mark.parametrize("manner", [USAGE, NO_USAGE])
def test_tokens_are_counted_also_where_the_server_does_not_say(manner: str) -> None:
    with scripted("one two", manner) as server:
        endpoint = Endpoint.discover("peer", server.url)
        (answer,) = asyncio.run(ask_all(endpoint, ["hi"], 3, 1))
    assert (answer.text, answer.num_tokens) == ("one two one ", 3)
    assert answer.sent < answer.arrivals[0] <= answer.arrivals[-1]
    assert server.asked[0]["model"] == "scripted"


@pytest.mark.parametrize(
    ("field", "value"), [("ignore_eos", True), ("min_tokens", 4), ("generation_config", None)]
)
def test_each_server_gets_only_the_field_that_it_knows(field: Stopless, value: object) -> None:
    with scripted() as server:
        endpoint = Endpoint.discover("peer", server.url, goes_on_by=field)
        asyncio.run(ask_all(endpoint, ["hi"], 4, 1))
    (body,) = server.asked
    assert {"ignore_eos", "min_tokens", "generation_config"} & set(body) == {field}
    if value is None:
        value = body[field]
        assert json.loads(str(value))["max_new_tokens"] == 4
    assert body[field] == value


def test_no_more_requests_are_open_than_streams() -> None:
    with scripted() as server:
        endpoint = Endpoint.discover("peer", server.url)
        answers = asyncio.run(ask_all(endpoint, [f"question {i}" for i in range(7)], 2, 3))
    assert len(answers) == len(server.asked) == 7
    assert 1 <= server.most_open <= 3


def test_a_refusal_names_the_server_and_its_reason() -> None:
    with scripted(manner=REFUSAL) as server:
        endpoint = Endpoint.discover("peer", server.url)
        with pytest.raises(RuntimeError, match=r"peer: status 429.*busy"):
            asyncio.run(ask_all(endpoint, ["hi"], 2, 1))


def test_the_latency_benchmark_measures_any_url() -> None:
    with scripted() as server:
        target = UrlTarget.discover("peer", server.url)
        times = target.run([[1, 2], [3, 4]], 5)
    assert [len(request.tokens) for request in times] == [5, 5]


def test_time_per_token_counts_tokens_rather_than_chunks() -> None:
    answer = Answer(sent=1.0, arrivals=(1.5, 2.5), text="", num_tokens=5)
    assert (answer.ttft, answer.ttit) == (0.5, 0.25)
    assert Answer(1.0, (1.5,), "", 5).ttit is None
