"""What both generating routes share: places in the queue, echoes, closing of generators."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any, cast

import pytest

from server.openai.inputs import echo
from server.openai.reply.choice import ChoiceDelta
from server.openai.reply.generation import Generation
from server.text.output.stream import TextDelta, TextStream
from tests.server.openai.test_refusals import error_of
from tests.support.servers.http_server import CHAT, CHAT_PATH, COMPLETION, COMPLETION_PATH, Server

MakeServer = Callable[..., Server]
CONTENT = {CHAT_PATH: CHAT, COMPLETION_PATH: COMPLETION}
LOGPROBS = {CHAT_PATH: True, COMPLETION_PATH: 1}
Push = Callable[[TextStream, Sequence[int]], TextDelta]


def with_echoes_through(monkeypatch: pytest.MonkeyPatch, push: Push) -> None:
    """Let `push` make the texts of echoed prompts; generated texts stay as they are."""

    class EchoStream(TextStream):
        def push(self, token_ids: Sequence[int]) -> TextDelta:
            return push(self, token_ids)

    monkeypatch.setattr(echo, "TextStream", EchoStream)


def test_an_echo_that_fails_releases_its_places(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(stream: TextStream, token_ids: Sequence[int]) -> TextDelta:
        raise RuntimeError("a bug")

    with_echoes_through(monkeypatch, fail)
    error_of(server.complete(prompt=[3, 4], echo=True, n=2), 500)
    admission = server.context.admission
    assert (admission.num_waiting, admission.waiting_tokens) == (0, 0)
    assert server.engine.submitted == []


def test_an_echo_is_made_once_off_the_event_loop_while_its_request_holds_its_places(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[bool, int]] = []

    def watch(stream: TextStream, token_ids: Sequence[int]) -> TextDelta:
        on_loop = threading.current_thread() is threading.main_thread()
        seen.append((on_loop, server.context.admission.num_waiting))
        return TextStream.push(stream, token_ids)

    with_echoes_through(monkeypatch, watch)
    ids = server.ids("hi")
    reply = server.complete(prompt=ids, echo=True, n=3).json()
    assert [choice["text"] for choice in reply["choices"]] == ["hihello there"] * 3
    assert seen == [(False, 3)]


@pytest.mark.parametrize("path", CONTENT)
@pytest.mark.parametrize("stream", [False, True])
def test_deltas_that_cannot_be_written_are_closed_by_their_consumer(
    server: Server, monkeypatch: pytest.MonkeyPatch, path: str, stream: bool
) -> None:
    """And not by the garbage collector, in another task and at any time."""
    tasks: list[asyncio.Task[Any] | None] = []

    async def deltas(*_: object) -> AsyncGenerator[ChoiceDelta, None]:
        tasks.append(asyncio.current_task())
        try:
            yield ChoiceDelta(7, "of a choice that nobody asked for", cast("Any", None))
        finally:
            tasks.append(asyncio.current_task())

    monkeypatch.setattr(Generation, "deltas", deltas)
    error_of(server.post(path, CONTENT[path] | {"stream": stream, "logprobs": LOGPROBS[path]}), 500)
    asked, closed = tasks
    assert asked is closed
    assert server.context.admission.num_waiting == 0
