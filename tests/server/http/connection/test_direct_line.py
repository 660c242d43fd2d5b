"""Tokens of a stream go from the engine's message to the connection, and wake no task."""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
from collections.abc import Callable

import pytest

from engine.request import FinishReason
from server.http.connection.protocol import HttpProtocol
from server.openai.endpoints.chat import ChatWriter
from server.openai.reply.choice import ChoiceDelta
from tests.server.http.connection.test_protocol import POST, Line, talk
from tests.support.engines.scripted_engine import finished, say, tokens
from tests.support.servers.http_server import CHAT, Server
from tests.support.waiting import until

MakeServer = Callable[..., Server]


@pytest.fixture
def open_server(make_server: MakeServer) -> Server:
    """A server that says one letter and leaves the rest to the test."""
    found = make_server()
    found.engine.script = say(found.ids("h"), ends=False)
    return found


async def ask(line: Line, **fields: object) -> None:
    """Ask for a stream; returns once its first token was sent and its task waits."""
    body = json.dumps(CHAT | {"stream": True, **fields}).encode()
    head = POST + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
    await line.send(head + body)
    await line.reader.readuntil(b'"content":"h"')
    for _ in range(9):
        await asyncio.sleep(0)


def feed(server: Server, text: str) -> None:
    server.engine.feed(tokens(server.engine.submitted[0], server.ids(text)))


def end(server: Server, count: int) -> None:
    server.engine.feed(finished(server.engine.submitted[0], FinishReason.LENGTH, count))


def unread(server: Server) -> int:
    """Events that wait for the task of the stream."""
    return len(server.engine._open[server.engine.submitted[0].request_id])


def arrived(line: Line) -> bytes:
    """What the system has for the client now."""
    handle: int = line._writer.get_extra_info("socket").fileno()
    with socket.socket(fileno=os.dup(handle)) as connection:
        return connection.recv(1 << 16, socket.MSG_PEEK | socket.MSG_DONTWAIT)


def contents(stream: bytes) -> str:
    found = re.findall(rb'"delta":\{"content":("(?:[^"\\]|\\.)*")\}', stream)
    return "".join(json.loads(each) for each in found)


def test_a_token_is_with_the_client_before_its_task_runs(open_server: Server) -> None:
    async def scene(line: Line) -> None:
        await ask(line)
        for text in ('say "hi"', "a\nb", "ü"):
            feed(open_server, text)
            assert unread(open_server) == 0
            await asyncio.sleep(0)
            (size, chunk, rest) = arrived(line).split(b"\r\n", 2)
            assert (int(size, 16), rest) == (len(chunk), b"")
            assert contents(chunk) == text
            assert await line.reader.readexactly(len(size) + 2 + len(chunk) + 2)
        end(open_server, 9)
        last = await line.rest()
        assert b'"finish_reason":"length"' in last
        assert last.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")

    talk(open_server, scene)


def test_tokens_wait_for_a_client_that_does_not_read_and_keep_their_order(
    open_server: Server,
) -> None:
    connections: list[HttpProtocol] = []

    class Known(HttpProtocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            connections.append(self)

    async def scene(line: Line) -> None:
        await ask(line)
        (connection,) = connections
        feed(open_server, "a")
        connection.pause_writing()  # the transport calls it when its buffer is full
        for text in "bcd":
            feed(open_server, text)
            await asyncio.sleep(0)
        feed(open_server, "e")
        assert unread(open_server) == 3, "the task holds the first one"
        connection.resume_writing()
        feed(open_server, "f")
        while unread(open_server):
            await asyncio.sleep(0)
        feed(open_server, "g")
        end(open_server, 8)
        assert contents(await line.rest()) == "abcdefg"

    talk(open_server, scene, Known)


def test_an_error_ends_the_stream_as_one_in_its_task_does(
    open_server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write = ChatWriter.events

    def events(self: ChatWriter, delta: ChoiceDelta) -> bytes:
        if "!" in delta.text:
            raise RuntimeError("a bug")
        return write(self, delta)

    monkeypatch.setattr(ChatWriter, "events", events)

    async def scene(line: Line) -> None:
        await ask(line)
        feed(open_server, "a")
        feed(open_server, "!")
        feed(open_server, "b")
        last = await line.rest()
        assert contents(last) == "a"
        assert b'"code":"internal_error"' in last
        assert last.endswith(b"0\r\n\r\n")
        assert b"[DONE]" not in last

    talk(open_server, scene)
    assert open_server.engine.open_ids == []
    assert "a bug" in caplog.text


def test_a_stop_string_ends_it_and_aborts(open_server: Server) -> None:
    async def scene(line: Line) -> None:
        await ask(line, stop="xyz")
        feed(open_server, "abc")
        feed(open_server, "xyz more")
        last = await line.rest()
        assert contents(last) == "abc"
        assert b'"finish_reason":"stop"' in last

    talk(open_server, scene)
    assert len(open_server.engine.aborted) == 1


@pytest.mark.parametrize("last_bytes", [b"no HTTP\r\n\r\n", None], ids=["invalid", "lost"])
def test_a_stream_ends_with_its_connection_while_another_request_waits(
    open_server: Server, caplog: pytest.LogCaptureFixture, last_bytes: bytes | None
) -> None:
    body = json.dumps(CHAT | {"stream": True}).encode()
    request = POST + b"Content-Length: %d\r\n\r\n%b" % (len(body), body)

    async def scene(line: Line) -> None:
        await line.send(request, request)
        await line.reader.readuntil(b'"content":"h"')
        if last_bytes is None:
            (await line.served()).transport.abort()  # as a write does that fails
        else:
            await line.send(last_bytes)
            await line.rest()
        await until(lambda: bool(open_server.engine.aborted))

    talk(open_server, scene)
    assert open_server.engine.aborted == [open_server.engine.submitted[0].request_id]
    assert len(open_server.engine.submitted) == 1
    assert not [each for each in caplog.records if each.levelname == "ERROR"]
