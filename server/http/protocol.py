"""One HTTP connection: uvicorn's protocol with our limits on size and time, and our errors."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from server.http.connections import PROBE_PATHS, Connections
from server.http.errors import ApiError, invalid
from server.http.request_log import ID_HEADER, error_response, request_id

MAX_HEAD = 64 * 1024  # bytes of the request line and headers, and of all else but bodies

logger = logging.getLogger(__name__)


class HttpProtocol(HttpToolsProtocol):
    """Refuses too long heads with 431 before they are complete, requests that stop arriving with
    408, and invalid HTTP with 400. Each of these closes the connection.

    All bytes since the last complete head, piece of a body or end of a request count as head, so
    that trailers and chunk extensions are bounded, too.
    """

    head_timeout = 30.0  # seconds for the whole head
    body_timeout = 60.0  # seconds between pieces of the body
    extra_timeout = 2.0  # seconds for the whole head on a connection above the limit

    def __init__(self, *args: Any, limit: Connections | None = None, **kwargs: Any) -> None:
        """`limit`: of open connections, None for none."""
        super().__init__(*args, **kwargs)
        self._limit = limit
        self._is_extra = False  # above the limit: serves one probe, and nothing else
        self._num_fruitless = 0  # bytes
        self._refusal: ApiError | None = None  # why a head that the parser accepts is refused
        self._in_request = False  # between the first and last byte of a request
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if self._limit is not None and self._limit.is_extra(len(self.server_state.connections)):
            self._is_extra = True
            self._limit.enter(self)
        self._expect_within(self.extra_timeout if self._is_extra else self.head_timeout)

    def connection_lost(self, exc: Exception | None) -> None:
        self._expect_nothing()
        if self._limit is not None:
            self._limit.leave(self)
        super().connection_lost(exc)

    def give_way(self) -> None:
        """Close a connection above the limit, for another one."""
        assert self._limit is not None
        if not self.transport.is_closing():
            self._refuse(self._limit.refuse())

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        self._num_fruitless += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._num_fruitless > MAX_HEAD:
            self._refuse(_head_too_large())
        elif self._timer is None and self._waits():
            self._expect_within(self.head_timeout)  # happens for line breaks between requests

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_request = True
        if not self._is_extra:
            self._expect_within(self.head_timeout)

    def on_headers_complete(self) -> None:
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if size > MAX_HEAD:
            self._refusal = _head_too_large()
        elif self._is_extra and self.url.partition(b"?")[0] not in PROBE_PATHS:
            assert self._limit is not None
            self._refusal = self._limit.refuse()
        if self._refusal is not None:
            raise ValueError("the parser reports it as its own error")
        self._num_fruitless = 0
        self._expect_within(self.body_timeout)
        super().on_headers_complete()
        if self._is_extra:
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        self._num_fruitless = 0
        self._expect_within(self.body_timeout)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._num_fruitless = 0
        self._in_request = False
        self._expect_nothing()
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """uvicorn calls this when its parser fails."""
        self._refuse(self._refusal or invalid(msg, code="invalid_http"))

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
        if self.cycle is not None:  # it must not write after this
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()

    def _may_answer(self) -> bool:
        cycle = self.cycle
        if cycle is None or cycle.response_complete:
            return True
        # An answer that has not started may be replaced if it is for the invalid request.
        return cycle.scope is self.scope and not cycle.response_started and not self.pipeline

    def _write(self, error: ApiError, id: str) -> None:
        headers, body = error_response(error)
        headers += [(ID_HEADER, id.encode()), (b"connection", b"close")]
        lines = [
            name + b": " + value + b"\r\n"
            for name, value in [*self.server_state.default_headers, *headers]
        ]
        self.transport.write(b"".join([STATUS_LINE[error.status], *lines, b"\r\n", body]))


def _head_too_large() -> ApiError:
    message = f"The request line and headers have more than {MAX_HEAD} bytes"
    return ApiError(431, message, "invalid_request_error", code="headers_too_large")
