"""Many clients at once, and clients that disconnect."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai

from tests.e2e.conftest import MAX_LEN, MODEL
from tests.support.servers.live_server import LiveServer, idle, post

TEMPERATURES = (0.0, 0.7, 1.0, 1.5)
WORDS = ("the quick brown fox", "a server answers many clients", "def main():", "日本 é", "x")
ENDLESS: dict[str, Any] = {
    "model": MODEL,
    "prompt": "the lazy dog",
    "max_tokens": MAX_LEN - 100,
    "temperature": 0,
}
OPTIONS: dict[str, Any] = {"ignore_eos": True}
Heard = tuple[str, str, int, int]  # text, finish reason, prompt tokens, output tokens


def fields_of(number: int) -> dict[str, Any]:
    """Request `number` of 64: lengths, temperatures, prompts and seeds all differ."""
    content = f"{WORDS[number % len(WORDS)]} " * (1 + number % 7)
    return {
        "model": MODEL,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 1 + (number * 37) % 64,
        "temperature": TEMPERATURES[number % len(TEMPERATURES)],
        "seed": number,
        "extra_body": {"ignore_eos": number % 2 == 0},
    }


async def hear(client: openai.AsyncOpenAI, number: int) -> Heard:
    text, reason, usage = "", "", None
    stream = await client.chat.completions.create(
        **fields_of(number), stream=True, stream_options={"include_usage": True}
    )
    async for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            reason = choice.finish_reason or reason
    return text, reason, usage.prompt_tokens, usage.completion_tokens


def counted(server: LiveServer) -> tuple[float, ...]:
    """Prompt tokens, output tokens and requests, once the engine is idle."""
    found = server.wait_metrics(idle)
    names = ("prompt_tokens_total", "generation_tokens_total", "request_success_total")
    return tuple(found[name] for name in names)


def test_64_streams_at_once_say_what_each_says_alone(server: LiveServer) -> None:
    async def main() -> tuple[list[Heard], list[Heard]]:
        async with server.async_client() as client:
            alone = [await hear(client, number) for number in range(64)]
            together = await asyncio.gather(*(hear(client, number) for number in range(64)))
            return alone, together

    before = counted(server)
    alone, together = asyncio.run(main())
    assert together == alone
    assert len({text for text, *_ in alone}) > 32, "the requests must differ"
    assert {reason for _, reason, *_ in alone} == {"stop", "length"}
    expected = [2 * sum(heard[2] for heard in alone), 2 * sum(heard[3] for heard in alone), 128]
    grown = [new - old for new, old in zip(counted(server), before, strict=True)]
    assert grown == expected


def num_aborted(server: LiveServer) -> float:
    return server.metrics()["ended_abort"]


def assert_nothing_runs(server: LiveServer, num_aborts: float) -> None:
    """Assert that `num_aborts` requests were aborted since the start, that the engine is idle, and
    that from now on it computes only new requests."""
    before = counted(server)
    assert num_aborted(server) == num_aborts
    done = server.client().completions.create(**ENDLESS | {"max_tokens": 5}, extra_body=OPTIONS)
    after = counted(server)
    grown = [new - old for new, old in zip(after, before, strict=True)]
    assert grown == [done.usage.prompt_tokens, 5, 1]


def test_a_client_that_leaves_a_stream_ends_its_request(server: LiveServer) -> None:
    before = num_aborted(server)
    with server.client().completions.create(**ENDLESS, stream=True, extra_body=OPTIONS) as stream:
        for _, _ in zip(range(5), stream, strict=False):
            pass
        assert server.metrics()["num_requests_running"] == 1
    assert_nothing_runs(server, before + 1)


def test_a_client_that_leaves_before_the_answer_ends_its_request(server: LiveServer) -> None:
    before, body = num_aborted(server), json.dumps(ENDLESS | OPTIONS).encode()
    with post(server.url, "/v1/completions", body):
        server.wait_metrics(lambda found: found["num_requests_running"] == 1)
    assert_nothing_runs(server, before + 1)


def test_a_client_that_leaves_ends_all_its_choices(server: LiveServer) -> None:
    before = num_aborted(server)
    call = server.client().completions.create(**ENDLESS, stream=True, n=3, extra_body=OPTIONS)
    with call as stream:
        next(iter(stream))
        server.wait_metrics(lambda found: found["num_requests_running"] == 3)
    assert_nothing_runs(server, before + 3)
