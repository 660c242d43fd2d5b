"""Clients that send slowly, stop in the middle, do not read, or close one side of a connection."""

from __future__ import annotations

import json

import msgspec
import pytest

from server.http.connection import outlet
from server.http.connection.protocol import HttpProtocol
from server.http.middleware.body_limit import BodyHold
from tests.server.http.connection.test_protocol import (
    CHUNKED,
    GET,
    POST,
    Line,
    MakeServer,
    skip,
    talk,
)
from tests.support.engines.scripted_engine import INFO, say
from tests.support.servers.http_server import CHAT, Server
from tests.support.waiting import DEADLINE, until

BODY = json.dumps(CHAT).encode()
WHOLE = POST + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY


def test_a_body_that_trickles_is_408(server: Server) -> None:
    came: list[bytes] = []

    class Noting(HttpProtocol):
        def on_body(self, body: bytes) -> None:
            super().on_body(body)
            came.append(body)

    async def scene(line: Line) -> None:
        await line.send(POST + b"Content-Length: 100000\r\n\r\n")
        await until(lambda: server.context.state._num_arriving)
        for number in range(4):
            await line.send(b" ")
            await until(lambda number=number: len(came) > number)
            skip(HttpProtocol.body_timeout / 4)
        status, headers, _ = await line.answer()
        assert (status, headers["connection"]) == (408, "close")

    talk(server, scene, Noting)
    assert server.context.state.num_open == 0


def test_a_request_whose_body_is_not_here_delays_no_drain(server: Server) -> None:
    state = server.context.state

    async def scene(line: Line) -> None:
        await line.send(POST + b"Content-Length: 100\r\n\r\n{")
        await until(lambda: state._num_arriving)
        assert state.num_open == 0
        state.start_draining()
        await state.wait_idle()
        await line.send(b" " * 99)
        assert (await line.answer())[0] in (400, 503)

    talk(server, scene)


def test_a_server_that_ends_refuses_what_has_not_arrived(server: Server) -> None:
    connections: list[HttpProtocol] = []

    class Known(HttpProtocol):
        def on_headers_complete(self) -> None:
            super().on_headers_complete()
            connections.append(self)

    async def scene(line: Line) -> None:
        await line.send(POST + b"Content-Length: 100\r\n\r\n{")
        await until(lambda: connections)
        connections[0].shutdown()
        status, _, body = await line.answer()
        assert (status, json.loads(body)["error"]["code"]) == (503, "draining")
        assert await line.rest() == b""

    talk(server, scene, Known)


def test_without_a_key_it_is_401_before_the_body_has_come(make_server: MakeServer) -> None:
    server = make_server(api_keys=("key",))

    async def scene(line: Line) -> None:
        await line.send(POST + b"Content-Length: 4000000\r\n\r\n")
        assert (await line.answer())[0] == 401

    talk(server, scene)


def test_bodies_of_all_requests_together_are_bounded(
    make_server: MakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = make_server(max_pending_body_bytes=1000)
    counted, take = [0], BodyHold.take

    def noted(hold: BodyHold, num_bytes: int) -> None:
        take(hold, num_bytes)
        counted[0] += num_bytes

    monkeypatch.setattr(BodyHold, "take", noted)

    async def scene(line: Line) -> None:
        first = await line.beside()
        await first.send(POST + b"Content-Length: 5000\r\n\r\n" + b" " * 900)
        await until(lambda: counted[0] == 900)
        await line.send(POST + b"Content-Length: 300\r\n\r\n" + b" " * 300)
        status, headers, body = await line.answer()
        assert (status, headers["retry-after"], headers["connection"]) == (429, "1", "close")
        assert b"server.max_pending_body_bytes" in body
        await first.send(b" " * (4100 - len(BODY)) + BODY)  # alone it may be longer
        assert (await first.answer())[0] == 200
        first.close()

    talk(server, scene)


@pytest.mark.parametrize("closing", [b"", b"Connection: close\r\n"])
@pytest.mark.parametrize("framing", [b"Content-Length: 5000000\r\n\r\n", b""])
def test_a_body_above_the_limit_gets_its_413(
    make_server: MakeServer, monkeypatch: pytest.MonkeyPatch, closing: bytes, framing: bytes
) -> None:
    """However the connection ends: a reset would take the answer from the client."""
    monkeypatch.setattr(outlet, "LINGER", DEADLINE)
    server = make_server(max_body_bytes=100_000)
    chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"

    async def scene(line: Line) -> None:
        head = CHUNKED[: -len(b"\r\n")] + closing + b"\r\n"
        if framing:
            head = POST + closing + framing
        await line.send(head, *([b" " * 500_000] * 10 if framing else [chunk] * 80))
        status, headers, _ = await line.answer()
        assert (status, headers["connection"]) == (413, "close")
        assert await line.rest() == b""

    talk(server, scene)


def test_a_client_that_closes_its_side_gets_its_answer(server: Server) -> None:
    async def scene(line: Line) -> None:
        await line.send(GET + WHOLE)
        line.write_eof()
        for _ in range(2):
            assert (await line.answer())[0] == 200
        assert await line.rest() == b""

    talk(server, scene)


def test_a_client_that_closes_both_sides_is_gone(make_server: MakeServer) -> None:
    server = make_server(lambda _: [])

    async def scene(line: Line) -> None:
        await line.send(WHOLE)
        await until(lambda: server.engine.submitted)
        line.close()
        await until(lambda: not server.engine.open_ids)

    talk(server, scene)


def test_http_1_0_gets_a_stream_without_chunks(server: Server) -> None:
    body = json.dumps(CHAT | {"stream": True}).encode()
    head = POST.replace(b"HTTP/1.1", b"HTTP/1.0") + b"Content-Length: %d\r\n\r\n" % len(body)

    async def scene(line: Line) -> None:
        await line.send(head + body)
        found_head, _, events = (await line.rest()).partition(b"\r\n\r\n")
        assert b"transfer-encoding" not in found_head
        assert b"connection: close" in found_head
        assert events.startswith(b"data: {")
        assert events.endswith(b"data: [DONE]\n\n")

    talk(server, scene)


class Unread(HttpProtocol):
    write_timeout = 0.05


@pytest.mark.parametrize("draining", [False, True])
def test_a_client_that_does_not_read_is_disconnected(
    make_server: MakeServer, monkeypatch: pytest.MonkeyPatch, draining: bool
) -> None:
    """While the server drains, after a shorter time."""
    server = make_server(say([3] * 20_000))
    server.engine.info = msgspec.structs.replace(INFO, max_model_len=30_000)
    protocol = Unread
    if draining:
        monkeypatch.setattr(outlet, "DRAIN_TIMEOUT", 0.05)
        monkeypatch.setattr(outlet, "TICK", 0.02)
        patient = {"write_timeout": 30.0, "draining": staticmethod(lambda: True)}
        protocol = type("Draining", (HttpProtocol,), patient)
    body = json.dumps(CHAT | {"stream": True, "max_tokens": 20_000}).encode()

    async def scene(line: Line) -> None:
        line.read_nothing()
        await line.send(POST + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        await until(lambda: server.engine.submitted)
        await until(lambda: not server.context.state.num_open)

    talk(server, scene, protocol)
