"""Connections as sockets see them: heads that are too long, too slow, or not HTTP."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from collections.abc import Awaitable, Callable
from typing import Any, cast

import pytest
from uvicorn.server import ServerState

from configs.schema import ServerConfig
from server.http.connection.protocol import MAX_HEAD, HttpProtocol, protocol_with
from server.process.web import web_config
from tests.support.servers.http_server import CHAT, CHAT_PATH, Server
from tests.support.waiting import DEADLINE, until

MakeServer = Callable[..., Server]
GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
POST = (
    b"POST "
    + CHAT_PATH.encode()
    + b" HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
)
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"


def skip(seconds: float) -> None:
    """Put the clock of the running loop forward: no test waits for a client to be too slow, and no
    client is too slow because the machine is busy."""
    loop = asyncio.get_running_loop()
    before = loop.time
    loop.time = lambda: before() + seconds  # type: ignore[method-assign]


class Line:
    """A client's connection."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, state: ServerState
    ) -> None:
        self.reader = reader
        self._writer = writer
        self._state = state

    @classmethod
    async def open(cls, address: tuple[str, int], state: ServerState) -> Line:
        """To the server at `address`, whose connections are in `state`."""
        return cls(*await asyncio.open_connection(*address), state)

    async def beside(self) -> Line:
        """Another connection to the same server."""
        return await self.open(self._writer.get_extra_info("peername"), self._state)

    async def served(self) -> HttpProtocol:
        """The server's end, once it is there."""
        name = self._writer.get_extra_info("sockname")
        ends = cast("set[HttpProtocol]", self._state.connections)
        await until(lambda: any(end.client == name for end in ends))
        return next(end for end in ends if end.client == name)

    async def send(self, *pieces: bytes) -> None:
        """Write pieces one by one; those after a close are dropped."""
        for piece in pieces:
            self._writer.write(piece)
            try:
                await self._writer.drain()
            except ConnectionError:
                return

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        """One complete answer: status, headers, body. ConnectionError without one."""
        try:
            head = await self.reader.readuntil(b"\r\n\r\n")
            first, *lines = head.decode().strip().split("\r\n")
            headers = dict(line.lower().split(": ", 1) for line in lines)
            body = await self.reader.readexactly(int(headers["content-length"]))
        except asyncio.IncompleteReadError as error:
            raise ConnectionError from error
        return int(first.split()[1]), headers, body

    async def rest(self) -> bytes:
        """All bytes until the server closes."""
        try:
            return await self.reader.read()
        except ConnectionError:
            return b""

    def close(self) -> None:
        self._writer.close()

    def write_eof(self) -> None:
        self._writer.write_eof()

    def read_nothing(self) -> None:
        """Let the server's answers fill a small buffer of this side."""
        connection = self._writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self._writer.transport.pause_reading()  # type: ignore[attr-defined]


def talk(
    server: Server,
    scene: Callable[[Line], Awaitable[None]],
    protocol: type[HttpProtocol] = HttpProtocol,
) -> None:
    """Run `scene` on a connection to the application."""

    async def main() -> None:
        config = web_config(server.app)
        config.load()
        state = ServerState()
        loop = asyncio.get_running_loop()
        listener = await loop.create_server(
            lambda: protocol(config, state, app_state={}), "127.0.0.1", 0
        )
        line = await Line.open(listener.sockets[0].getsockname(), state)
        try:
            await asyncio.wait_for(scene(line), DEADLINE)
        finally:
            line.close()
            for connection in list(state.connections):
                connection.transport.abort()
            listener.close()
            await listener.wait_closed()
            await asyncio.gather(*state.tasks)

    asyncio.run(main())


async def refused(
    line: Line, status: int, code: str, kind: str = "invalid_request_error"
) -> dict[str, str]:
    """Assert that the next answer is this error and the last one; return its headers."""
    found, headers, body = await line.answer()
    error: dict[str, Any] = json.loads(body)["error"]
    assert (found, error["code"], error["type"]) == (status, code, kind)
    assert headers["content-type"] == "application/json"
    assert headers["connection"] == "close"
    assert await line.rest() == b""
    return headers


def letters(count: int) -> list[bytes]:
    """`count` letters in blocks of at most 1024, to make a header longer."""
    return [b"a" * 1024] * (count // 1024) + [b"a" * (count % 1024)]


@pytest.mark.parametrize("protocol", [b"h2c", b"websocket", b"TLS/1.0"])
@pytest.mark.parametrize("apart", [False, True])
def test_a_request_that_would_rather_speak_another_protocol_is_answered(
    server: Server, protocol: bytes, apart: bool
) -> None:
    """With its body, as Java's client sends it, and again on the same connection."""
    body = json.dumps(CHAT).encode()
    wish = b"Connection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAEA\r\nUpgrade: " + protocol
    head = POST + wish + b"\r\nContent-Length: %d\r\n\r\n" % len(body)

    async def scene(line: Line) -> None:
        await line.send(*((head[:99], head[99:], body) if apart else (head + body,)))
        status, headers, _ = await line.answer()
        assert status == 200
        assert "upgrade" not in headers
        await line.send((head + body) * 2 + GET)
        assert [(await line.answer())[0] for _ in range(3)] == [200] * 3

    talk(server, scene)
    assert len(server.engine.submitted) == 3


@pytest.mark.parametrize("start", [b"GET /", GET[:-2] + b"X-A", GET[:-2] + b"X-A: "])
@pytest.mark.parametrize("earlier", [0, 1])
def test_a_head_without_an_end_is_refused(server: Server, start: bytes, earlier: int) -> None:
    async def scene(line: Line) -> None:
        for _ in range(earlier):
            await line.send(GET)
            assert (await line.answer())[0] == 200
        await line.send(start, *letters(MAX_HEAD + 1 - len(start)))
        await refused(line, 431, "headers_too_large")

    talk(server, scene)


@pytest.mark.parametrize("start", [b"0\r\nX-A: ", b"1;a="], ids=["trailer", "extension"])
def test_a_body_of_nothing_but_its_encoding_is_refused(server: Server, start: bytes) -> None:
    async def scene(line: Line) -> None:
        await line.send(CHUNKED)
        await until(lambda: server.context.state._num_arriving)
        await line.send(start, *letters(MAX_HEAD + 1 - len(start)))
        await refused(line, 431, "headers_too_large")

    talk(server, scene)
    assert server.context.state.num_open == 0


class Wire(asyncio.Transport):
    """A transport that keeps the bytes written to it."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.closed = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += data

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def can_write_eof(self) -> bool:
        return False

    def get_write_buffer_size(self) -> int:
        return 0

    def resume_reading(self) -> None:
        pass


@pytest.mark.parametrize("num_headers", [1, 1000])
def test_a_long_head_that_comes_whole_is_refused(server: Server, num_headers: int) -> None:
    one = b"X-A: " + b"a" * (MAX_HEAD // num_headers) + b"\r\n"
    wire = Wire()

    async def main() -> None:
        config = web_config(server.app)
        protocol = HttpProtocol(config, ServerState(), app_state={})
        protocol.connection_made(wire)
        protocol.data_received(GET[:-2] + one * num_headers + b"\r\n")
        protocol.data_received(GET)
        protocol.connection_lost(None)

    asyncio.run(main())
    assert wire.written.startswith(b"HTTP/1.1 431 ")
    assert wire.written.count(b"HTTP/1.1") == 1
    assert wire.closed


def test_heads_below_the_limit_are_read_on_every_request_of_a_connection(server: Server) -> None:
    long = GET[:-2] + b"X-A: " + b"a" * (MAX_HEAD - 100) + b"\r\n\r\n"

    async def scene(line: Line) -> None:
        for _ in range(3):
            await line.send(long[: MAX_HEAD // 2], long[MAX_HEAD // 2 :])
            assert (await line.answer())[0] == 200

    talk(server, scene)


def test_a_long_body_is_no_long_head(server: Server) -> None:
    body = json.dumps(CHAT).encode() + b" " * (4 * MAX_HEAD)
    head = POST + b"Content-Length: %d\r\n\r\n" % len(body)
    pieces = [body[at : at + 1000] for at in range(0, len(body), 1000)]

    async def scene(line: Line) -> None:
        await line.send(head, *pieces)
        assert (await line.answer())[0] == 200
        await line.send(GET)
        assert (await line.answer())[0] == 200

    talk(server, scene)


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 a TLS handshake",
        b"NONSENSE / HTTP/1.1\r\n\r\n",
        GET[:-2] + b"Content-Length: -1\r\n\r\n",
        GET[:-2] + b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        CHUNKED + b"no length\r\n",
    ],
)
def test_what_is_not_http_is_a_json_error(
    server: Server, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    async def scene(line: Line) -> None:
        await line.send(data)
        headers = await refused(line, 400, "invalid_http")
        assert headers["x-request-id"].startswith("req_")
        assert headers["x-request-id"] in caplog.text

    talk(server, scene)


@pytest.mark.parametrize(
    "trailer", [b"Host: elsewhere", b"Content-Encoding: gzip", b"X-Request-ID: mine"]
)
def test_trailers_are_no_headers(server: Server, trailer: bytes) -> None:
    body = json.dumps(CHAT).encode()
    chunk = b"%x\r\n%s\r\n" % (len(body), body)

    async def scene(line: Line) -> None:
        for _ in range(2):
            await line.send(CHUNKED + chunk + b"0\r\n" + trailer + b"\r\n\r\n")
            status, headers, _ = await line.answer()
            assert status == 200
            assert headers["x-request-id"] != "mine"

    talk(server, scene)


def test_a_transfer_coding_that_is_not_spoken_is_refused(server: Server) -> None:
    """Its body would be taken as it comes, compressed."""

    async def scene(line: Line) -> None:
        await line.send(POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n")
        await refused(line, 501, "unsupported_transfer_encoding")

    talk(server, scene)


class Short(HttpProtocol):
    """There is no memory for a body."""

    def on_body(self, body: bytes) -> None:
        raise MemoryError


def test_a_request_that_cannot_be_stored_is_no_fault_of_the_client(server: Server) -> None:
    async def scene(line: Line) -> None:
        await line.send(POST + b"Content-Length: 2\r\n\r\n{}")
        await refused(line, 500, "internal_error", "server_error")

    talk(server, scene, Short)


def test_a_refusal_carries_the_id_that_was_read_before(server: Server) -> None:
    async def scene(line: Line) -> None:
        await line.send(GET[:-2] + b"X-Request-ID: mine\r\nContent-Length: nine\r\n\r\n")
        assert (await refused(line, 400, "invalid_http"))["x-request-id"] == "mine"

    talk(server, scene)


def test_invalid_bytes_after_a_request_do_not_change_its_answer(make_server: MakeServer) -> None:
    server = make_server(lambda _: [])
    body = json.dumps(CHAT).encode()

    async def scene(line: Line) -> None:
        await line.send(POST + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        await until(lambda: server.engine.submitted)
        await line.send(b"\x00\x00\r\n\r\n")
        assert await line.rest() == b""

    talk(server, scene)
    assert server.engine.open_ids == []


@pytest.mark.parametrize("start", [GET[:10], GET[:-1], GET + GET[:10]])
def test_a_head_that_stops_coming_is_408(server: Server, start: bytes) -> None:
    async def scene(line: Line) -> None:
        await line.send(start)
        for _ in range(start.count(b"\r\n\r\n")):
            assert (await line.answer())[0] == 200
        end = await line.served()
        await until(lambda: end._in_request)
        skip(HttpProtocol.head_timeout)
        await refused(line, 408, "request_timeout")

    talk(server, scene)


@pytest.mark.parametrize("part", [b"", b"{"])
def test_a_body_that_stops_coming_is_408(server: Server, part: bytes) -> None:
    async def scene(line: Line) -> None:
        await line.send(POST + b"Content-Length: 10\r\n\r\n" + part)
        await until(lambda: server.context.state._num_arriving)
        skip(HttpProtocol.body_timeout)
        await refused(line, 408, "request_timeout")

    talk(server, scene)
    assert server.context.state.num_open == 0


@pytest.mark.parametrize(("earlier", "start"), [(0, b""), (0, b"\r\n"), (1, b"\r\n")])
def test_a_silent_connection_is_closed_without_an_answer(
    server: Server, start: bytes, earlier: int
) -> None:
    async def scene(line: Line) -> None:
        for _ in range(earlier):
            await line.send(GET)
            assert (await line.answer())[0] == 200
        await line.send(start)
        end = await line.served()
        await until(lambda: end._num_fruitless == len(start))
        skip(HttpProtocol.head_timeout)
        assert await line.rest() == b""

    talk(server, scene)


def test_no_time_runs_while_a_request_is_answered(make_server: MakeServer) -> None:
    server = make_server(lambda _: [])
    body = json.dumps(CHAT).encode()
    connections = []

    class Known(HttpProtocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            connections.append(self)
            assert self._timer is not None

    async def scene(line: Line) -> None:
        await line.send(POST + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        await until(lambda: server.engine.submitted)
        assert [connection._timer for connection in connections] == [None]

    talk(server, scene, Known)


@pytest.mark.parametrize("path", [b"/health", b"/ready", b"/version", b"/v1/models"])
@pytest.mark.parametrize("ready", [True, False])
def test_head_answers_as_get_does_without_a_body(server: Server, path: bytes, ready: bool) -> None:
    if not ready:
        server.engine.info = None

    async def scene(line: Line) -> None:
        await line.send(GET.replace(b"/health", path))
        status, headers, body = await line.answer()
        assert status == (200 if ready or path != b"/ready" else 503)
        assert len(body) > 0
        await line.send(GET.replace(b"/health", path).replace(b"GET", b"HEAD"))
        head = await line.reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 %d " % status)
        assert f"content-length: {headers['content-length']}\r\n".encode() in head
        await line.send(GET)  # after a body, this answer would not be found
        assert (await line.answer())[0] == 200

    talk(server, scene)


def test_probes_may_have_the_root_path() -> None:
    protocol = protocol_with(ServerConfig(root_path="/llm"), lambda: False)
    assert {b"/ready", b"/llm/ready"} < protocol.probe_paths
