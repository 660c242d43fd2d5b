"""No request keeps the event loop's thread busy for long, and short ones pass long ones."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
import time
from collections.abc import Callable

import httpx
import msgspec
import pytest

from engine.messages import Tokens
from engine.request import FinishReason, Request
from server.http.admission.lanes import LONG, LONG_THREADS
from tests.support.engines.scripted_engine import INFO, Event, finished, score
from tests.support.servers.http_server import CHAT, CHAT_PATH, COMPLETION_PATH, Server

MakeServer = Callable[..., Server]
LIMIT = 0.1  # seconds; before, logprobs took more than three times as long
NUM_TOKENS, NUM_TOP = 4000, 20
SCORES = [score(3 + n % 300, NUM_TOP) for n in range(NUM_TOKENS)]


def at_once(request: Request) -> list[Event]:
    events: list[Event] = [
        Tokens(request.request_id, [SCORES[n].token_id], [SCORES[n]]) for n in range(NUM_TOKENS)
    ]
    return [*events, finished(request, FinishReason.LENGTH, NUM_TOKENS)]


def scored_prompt(request: Request) -> list[Event]:
    scores = [None, *SCORES[1 : len(request.prompt_ids)]]
    first = Tokens(request.request_id, [3], [SCORES[0]], scores)
    return [first, finished(request, FinishReason.LENGTH, 1)]


class Turns:
    """Measures the turns of the running loop. It adds none: a loop that never sleeps would take
    the interpreter from the threads that do the work."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.longest = 0.0  # seconds that this thread computed without a break
        self._turn: Callable[[], None] = loop._run_once  # type: ignore[attr-defined]
        loop._run_once = self._timed  # type: ignore[attr-defined]

    def _timed(self) -> None:
        before = time.thread_time()
        self._turn()
        self.longest = max(self.longest, time.thread_time() - before)


CHAT_LOGPROBS = CHAT | {"logprobs": True, "top_logprobs": NUM_TOP}
CASES = {
    "chat": (CHAT_PATH, CHAT_LOGPROBS, at_once),
    "chat stream": (CHAT_PATH, CHAT_LOGPROBS | {"stream": True}, at_once),
    "completion": (COMPLETION_PATH, {"prompt": "hi", "logprobs": NUM_TOP}, at_once),
    "scored prompt": (
        COMPLETION_PATH,
        {"prompt": [3] * 3000, "echo": True, "logprobs": NUM_TOP},
        scored_prompt,
    ),
    "long text": (COMPLETION_PATH, {"prompt": "word " * 700_000}, at_once),
    "long ids": (COMPLETION_PATH, {"prompt": [3] * 1_000_000}, at_once),
    "many messages": (CHAT_PATH, CHAT | {"messages": CHAT["messages"] * 20_000}, at_once),
}


@pytest.mark.parametrize("name", CASES)
def test_the_loop_has_no_long_turns(make_server: MakeServer, name: str) -> None:
    path, body, script = CASES[name]
    gc.collect()
    gc.freeze()  # a look at all that other tests have left is not the server's turn
    server = make_server(script)
    server.engine.info = msgspec.structs.replace(INFO, max_model_len=10_000)
    content = json.dumps({"model": CHAT["model"], "max_tokens": NUM_TOKENS, **body}).encode()
    headers = {"content-type": "application/json"}

    async def ask(client: httpx.AsyncClient) -> float:
        turns = Turns(asyncio.get_running_loop())
        response = await client.post(path, content=content, headers=headers)
        assert response.status_code == (200 if name.split()[0] != "long" else 400)
        return turns.longest

    if name == "many messages":
        server.engine.info = msgspec.structs.replace(INFO, max_model_len=10_000_000)
    assert server.run(ask) < LIMIT


def test_short_prompts_pass_long_ones(server: Server) -> None:
    ended = threading.Event()

    async def ask(client: httpx.AsyncClient) -> int:
        lanes = server.context.lanes
        long = [asyncio.ensure_future(lanes.run(LONG, ended.wait)) for _ in range(9)]
        assert len(long) > LONG_THREADS
        try:
            return (await client.post(CHAT_PATH, json=CHAT)).status_code
        finally:
            ended.set()
            await asyncio.gather(*long)

    assert server.run(ask) == 200
