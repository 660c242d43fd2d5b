"""More connections than the server may have open."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest
from uvicorn.server import ServerState

from server.http.connection.connections import PROBES, Connections
from server.http.connection.protocol import HttpProtocol
from server.process.web import web_config
from tests.server.http.connection.test_protocol import CHAT_PATH, GET, Line, refused, skip
from tests.support.servers.http_server import Server
from tests.support.waiting import DEADLINE

MODELS = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
POST = (
    b"POST " + CHAT_PATH.encode() + b" HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}"
)


class Extra(HttpProtocol):
    """Above the limit, it has more time than a busy machine takes for a test."""

    extra_timeout = 60.0


class Full:
    """A listening server with one place for a connection, which is taken."""

    def __init__(self, server: Server, stack: contextlib.AsyncExitStack) -> None:
        limit = Connections(1, 7, server.context.metrics)
        self._config = web_config(server.app, limit)
        self._config.load()
        self._limit = limit
        self._state = ServerState()
        self._stack = stack

    async def listen(self) -> None:
        listener = await asyncio.get_running_loop().create_server(
            lambda: Extra(self._config, self._state, app_state={}, limit=self._limit),
            "127.0.0.1",
            0,
        )
        self._address = listener.sockets[0].getsockname()
        self._stack.callback(listener.close)
        self._stack.callback(self._drop)
        self.first = await self.connect()

    async def connect(self) -> Line:
        line = await Line.open(self._address, self._state)
        self._stack.callback(line.close)
        return line

    def _drop(self) -> None:
        for connection in list(self._state.connections):
            connection.transport.abort()


@contextlib.asynccontextmanager
async def full(server: Server) -> AsyncIterator[Full]:
    async with asyncio.timeout(DEADLINE), contextlib.AsyncExitStack() as stack:
        one = Full(server, stack)
        await one.listen()
        yield one


def num_refused(server: Server) -> int:
    name = 'aerie:admission_rejections_total{model_name="tiny",reason="connections"} '
    (line,) = [x for x in server.get("/metrics").text.splitlines() if x.startswith(name)]
    return int(float(line.removeprefix(name)))


@pytest.mark.parametrize("request_bytes", [MODELS, POST], ids=["get", "post"])
def test_a_connection_above_the_limit_gets_503_and_is_closed(
    server: Server, caplog: pytest.LogCaptureFixture, request_bytes: bytes
) -> None:
    async def main() -> None:
        async with full(server) as one:
            line = await one.connect()
            await line.send(request_bytes)
            headers = await refused(line, 503, "too_many_connections", "unavailable_error")
            assert headers["retry-after"] == "7"
            await one.first.send(MODELS)  # the place is still its own
            assert (await one.first.answer())[0] == 200

    asyncio.run(main())
    assert num_refused(server) == 1
    assert "connections refused: 1; at most 1 may be open (server.max_connections" in caplog.text


def test_probes_are_answered_above_the_limit_and_end_their_connection(server: Server) -> None:
    async def main() -> None:
        async with full(server) as one:
            line = await one.connect()
            await line.send(GET)
            status, headers, _ = await line.answer()
            assert (status, headers["connection"]) == (200, "close")
            assert await line.rest() == b""
            idle = await one.connect()
            await idle.served()
            skip(Extra.extra_timeout)
            assert await idle.rest() == b"", "who asks for nothing must go soon"

    asyncio.run(main())
    assert num_refused(server) == 0


def test_the_oldest_of_many_extra_connections_gives_way(server: Server) -> None:
    async def main() -> None:
        async with full(server) as one:
            oldest, *others = [await one.connect() for _ in range(PROBES)]
            late = await one.connect()
            await refused(oldest, 503, "too_many_connections", "unavailable_error")
            for line in (late, others[0]):
                await line.send(GET)
                assert (await line.answer())[0] == 200

    asyncio.run(main())
    assert num_refused(server) == 1


def test_refusals_share_lines_of_the_log(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    times = iter([0.0, 1.0, 9.0, 10.5])
    limit = Connections(5, 1, server.context.metrics, lambda: next(times))
    for _ in range(4):
        limit.refuse()
    said = [r.getMessage() for r in caplog.records if "refused" in r.getMessage()]
    assert [line.split(";")[0] for line in said] == [
        "connections refused: 1",
        "connections refused: 3",
    ]
