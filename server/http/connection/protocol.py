"""One HTTP connection: uvicorn's protocol with our limits on size and time, and our errors."""

from __future__ import annotations

import asyncio
import logging
import select
import sys
from collections.abc import Callable
from typing import Any, cast

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from configs.schema import ServerConfig
from server.http.connection.connections import PROBE_PATHS, Connections
from server.http.connection.direct_line import LINE, Departures, DirectLine
from server.http.connection.outlet import Outlet
from server.http.connection.upgrades import head_without_upgrade
from server.http.errors import ApiError, invalid, server_error, shorten, unavailable
from server.http.middleware.request_log import ID_HEADER, error_response, request_id

MAX_HEAD = 64 * 1024  # bytes of the request line and headers, and of all else but bodies
LOOK_EVERY = 0.1  # seconds between looks whether a client is gone that closed its side
PROBE_AT = 3  # the look before which it gets something to read
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"

logger = logging.getLogger(__name__)


class HttpProtocol(HttpToolsProtocol):
    """Refuses too long heads with 431 before they are complete, requests that do not arrive in time
    with 408, and invalid HTTP with 400. Each of these closes the connection.

    All bytes since the last complete head, piece of a body or end of a request count as head, so
    that trailers and chunk extensions are bounded, too.

    A client may close its side of the connection after its request. If it closed the other side,
    too, only a write shows it: an answer that takes longer is then preceded by 100 Continue.
    """

    head_timeout = 30.0  # seconds for the whole head
    body_timeout = 60.0  # seconds for the whole body
    write_timeout = 30.0  # seconds in which a client reads nothing
    extra_timeout = 2.0  # seconds for the whole head on a connection above the limit
    probe_paths = PROBE_PATHS  # which such a connection may ask for
    draining: Callable[[], bool] = staticmethod(lambda: False)
    outlet: Outlet

    def __init__(
        self,
        *args: Any,
        limit: Connections | None = None,
        departures: Departures | None = None,
        **kwargs: Any,
    ) -> None:
        """`limit`: of open connections, None for none. `departures`: those of all connections of
        the server, None for its own."""
        super().__init__(*args, **kwargs)
        self.departures = departures or Departures()
        self._limit = limit
        self._is_extra = False  # above the limit: serves one probe, and nothing else
        self._num_fruitless = 0  # bytes
        self._refusal: ApiError | None = None  # why a head that the parser accepts is refused
        self._in_request = False  # between the first and last byte of a request
        self._has_head = False  # what the parser reports as headers from now on are trailers
        self._timer: asyncio.TimerHandle | None = None
        self._heard_all = False  # the client has closed its side
        self._upgrades = False  # the request asks for another protocol, which is not spoken here
        self._ahead = b""  # what is to be parsed next, after such a request
        self._answered: RequestResponseCycle | None = None  # the newest one that is, or was

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.outlet = Outlet(transport, self.write_timeout, self.draining)
        if self._limit is not None and self._limit.is_extra(len(self.server_state.connections)):
            self._is_extra = True
            self._limit.enter(self)
        self._expect_within(self.extra_timeout if self._is_extra else self.head_timeout)

    def connection_lost(self, exc: Exception | None) -> None:
        self._expect_nothing()
        self.outlet.stop()
        if self._limit is not None:
            self._limit.leave(self)
        self._end_answers()
        super().connection_lost(exc)

    def eof_received(self) -> bool:  # type: ignore[override]
        """Keep the connection for the answers to whole requests."""
        self._heard_all = True
        if self._in_request or self._waits() or self.outlet.lingering:
            return False
        self.loop.call_later(LOOK_EVERY, self._look, 1)
        return True

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._in_request:  # the next one, which has a time of its own
            self._unset_keepalive_if_required()
        if self._heard_all and not self.pipeline and not self.transport.is_closing():
            self.transport.close()

    def shutdown(self) -> None:
        """uvicorn calls this when the server ends: nobody waits for the rest of a request."""
        if self._in_request and self._may_answer():
            self._refuse(unavailable("The server is shutting down", "draining", 1))
        else:
            super().shutdown()

    def give_way(self) -> None:
        """Close a connection above the limit, for another one."""
        assert self._limit is not None
        if self.outlet.is_closing():
            self.outlet.close()  # it may still linger
        else:
            self._refuse(self._limit.refuse())

    def data_received(self, data: bytes) -> None:
        if self.outlet.is_closing():
            self.outlet.discard(len(data))
            return
        self._num_fruitless += len(data)
        while data and not self.outlet.is_closing():
            self._ahead = data
            super().data_received(data)
            data = self._ahead if self._upgrades else b""
            self._upgrades = False
        self._ahead = b""
        if self.outlet.is_closing():
            return
        if self._num_fruitless > MAX_HEAD:
            self._refuse(_head_too_large())
        elif self._timer is None and self._waits():
            self._expect_within(self.head_timeout)  # happens for line breaks between requests

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_request = True
        self._has_head = False
        if not self._is_extra:
            self._expect_within(self.head_timeout)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Trailers are dropped: a proxy that checks the head does not look at them."""
        if not self._has_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._has_head = True
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if size > MAX_HEAD:
            self._refusal = _head_too_large()
        elif (codings := _transfer_codings(self.headers)) not in (b"", b"chunked"):
            self._refusal = _unknown_codings(codings)
        elif self._is_extra and self.url.partition(b"?")[0] not in self.probe_paths:
            assert self._limit is not None
            self._refusal = self._limit.refuse()
        if self._refusal is not None:
            raise ValueError("the parser reports it as its own error")
        if self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT":
            self._upgrades = True
            return
        self._num_fruitless = 0
        self._expect_within(self.body_timeout)
        super().on_headers_complete()
        if self._is_extra:
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        self._num_fruitless = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self._upgrades:  # the parser takes the body for the other protocol
            return
        self._num_fruitless = 0
        self._in_request = False
        self._expect_nothing()
        super().on_message_complete()

    def _unsupported_upgrade_warning(self) -> None:
        """uvicorn calls this while it handles the parser's word that the other protocol begins. The
        request is parsed again, without its wish, and with its body."""
        error = sys.exception()
        if not self._upgrades or not isinstance(error, HttpParserUpgrade):
            return
        method, version = self.parser.get_method(), self.parser.get_http_version()
        head = head_without_upgrade(method, self.url, version, self.headers)
        self._ahead = head + self._ahead[error.args[0] :]
        self.parser = HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does

    def send_400_response(self, msg: str) -> None:
        """uvicorn calls this while it handles an exception of its parser. That may come from what
        our side does with the parts, such as storing them when memory is short: then the request
        is not to blame."""
        error = sys.exception()
        cause = None if error is None else error.__context__
        if self._refusal is None and not isinstance(cause, ValueError | HttpParserError | None):
            logger.error("a request cannot be received: %r", cause)
            self._refuse(server_error("The server failed to receive this request; send it again"))
        else:
            self._refuse(self._refusal or invalid(msg, code="invalid_http"))

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGIApp) -> None:  # type: ignore[override]
        self._answered = cycle
        cycle.transport = _CycleOutlet(self, cycle)  # type: ignore[assignment]
        cast(Scope, cycle.scope)[LINE] = DirectLine(cycle, self.departures)
        if cycle.scope["http_version"] == "1.0":
            cycle.chunked_encoding = False
            app = _without_chunks(app, cycle)
        super()._start_asgi_task(cycle, app)  # type: ignore[arg-type]

    def _look(self, count: int) -> None:
        """Abort the connection if its client no longer reads, either: then it has reset it."""
        if self.transport.is_closing() or self._waits():
            return
        if _is_reset(self.transport):
            self.transport.abort()
            return
        cycle = self.cycle
        is_silent = not cycle.response_started and not self.pipeline
        if count == PROBE_AT and is_silent and cycle.scope["http_version"] != "1.0":
            self.outlet.write(CONTINUE)
        self.loop.call_later(LOOK_EVERY, self._look, count + 1)

    def _waits(self) -> bool:
        """Whether no request is being received or answered."""
        return self.cycle is None or self.cycle.response_complete

    def _expect_within(self, seconds: float) -> None:
        self._expect_nothing()
        self._timer = self.loop.call_later(seconds, self._time_out)

    def _expect_nothing(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _time_out(self) -> None:
        self._timer = None
        if self.transport.is_closing():
            return
        if self.flow.read_paused:  # the server is slow, not the client
            self._expect_within(self.head_timeout)
        elif self._in_request:
            message = "The request did not arrive in time"
            self._refuse(ApiError(408, message, "invalid_request_error", code="request_timeout"))
        else:
            self.transport.close()

    def _refuse(self, error: ApiError) -> None:
        """Answer with an error and close; if another answer is being sent, only close."""
        if self._may_answer():
            id = request_id(self.headers or [])
            level = logging.DEBUG if self._is_extra else logging.INFO  # the limit has its own lines
            logger.log(level, "refused a request: status=%d request_id=%s", error.status, ascii(id))
            self._write(error, id)
        self._end_answers()
        if self._is_extra:
            self.outlet.close()  # open files are few
        else:
            self.outlet.linger()

    def _end_answers(self) -> None:
        """Nothing is written after this. The request that is answered need not be `cycle`, which is
        the newest one that came: others wait in `pipeline`."""
        for cycle in (self._answered, self.cycle):
            if cycle is not None and not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()

    def _may_answer(self) -> bool:
        cycle = self.cycle
        if cycle is None:
            return True
        if cycle.response_complete:
            return not (self._in_request and cycle.scope is self.scope)
        # An answer that has not started may be replaced if it is for the invalid request.
        return cycle.scope is self.scope and not cycle.response_started and not self.pipeline

    def _write(self, error: ApiError, id: str) -> None:
        headers, body = error_response(error, error.body())
        headers += [(ID_HEADER, id.encode()), (b"connection", b"close")]
        lines = [
            name + b": " + value + b"\r\n"
            for name, value in [*self.server_state.default_headers, *headers]
        ]
        self.outlet.write(b"".join([STATUS_LINE[error.status], *lines, b"\r\n", body]))


def protocol_with(config: ServerConfig, draining: Callable[[], bool]) -> type[HttpProtocol]:
    """The protocol with the timeouts of a configuration."""
    root = config.root_path.encode()
    settings = {
        "probe_paths": PROBE_PATHS | {root + path for path in PROBE_PATHS},
        "body_timeout": config.body_timeout,
        "write_timeout": config.write_timeout,
        "draining": staticmethod(draining),
    }
    return type("ConfiguredHttpProtocol", (HttpProtocol,), settings)


class _CycleOutlet:
    """The outlet of one request: its close lets a body arrive that nobody reads."""

    def __init__(self, protocol: HttpProtocol, cycle: RequestResponseCycle) -> None:
        self._protocol = protocol
        self._cycle = cycle

    def write(self, data: bytes) -> None:
        self._protocol.departures.leave()  # earlier pieces of this answer may be there
        self._protocol.outlet.write(data)

    def is_closing(self) -> bool:
        return self._protocol.outlet.is_closing()

    def close(self) -> None:
        outlet = self._protocol.outlet
        if self._cycle.more_body and self._cycle.response_complete:
            outlet.linger()
        else:
            outlet.close()


def _is_reset(transport: asyncio.Transport) -> bool:
    """Whether the other side has reset the connection, which is no event once it sent its end."""
    poll = select.poll()
    poll.register(transport.get_extra_info("socket").fileno(), 0)
    return any(state & (select.POLLERR | select.POLLHUP) for _, state in poll.poll(0))


def _without_chunks(app: ASGIApp, cycle: RequestResponseCycle) -> ASGIApp:
    """The application for HTTP/1.0, which knows no chunks: the end of the connection is the end of
    the answer."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_plain(message: Message) -> None:
            if message["type"] == "http.response.body":  # uvicorn compares it with what was sent
                cycle.expected_content_length = len(message.get("body", b""))
            await send(message)

        await app(scope, receive, send_plain)

    return answer


def _transfer_codings(headers: list[tuple[bytes, bytes]]) -> bytes:
    values = [value for name, value in headers if name == b"transfer-encoding"]
    return b", ".join(values).strip().lower()


def _unknown_codings(codings: bytes) -> ApiError:
    """501, as RFC 9112 (6.1) has it."""
    message = f"The transfer-encoding is {shorten(codings.decode('latin-1'))}: it must be chunked"
    return ApiError(501, message, "invalid_request_error", code="unsupported_transfer_encoding")


def _head_too_large() -> ApiError:
    message = f"The request line and headers have more than {MAX_HEAD} bytes"
    return ApiError(431, message, "invalid_request_error", code="headers_too_large")
