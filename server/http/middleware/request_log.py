"""The outermost layer: request ids, one log line per request, and uncaught errors."""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.http.admission.state import ServerState
from server.http.errors import OPENAI, ApiError, ErrorManner, server_error
from server.http.monitoring.tracing import CURRENT_TRACE, RequestSpan, Tracing, trace_of

ID_HEADER = b"x-request-id"
MAX_ID_LENGTH = 128
WARNING_HEADER = "x-aerie-warning"
MAX_WARNING = 1000  # characters
RECORD = "aerie.record"  # key in the ASGI scope
QUIET = frozenset(
    {"/health", "/ready", "/metrics"}
)  # polled every few seconds: logged at debug level

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class RequestRecord:
    """Facts of one HTTP request for its log line; routes add to it."""

    request_id: str
    manner: ErrorManner = OPENAI
    started: float = field(default_factory=time.perf_counter)
    status: int | None = None  # None: nothing was sent
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    finish_reasons: list[str] = field(default_factory=list)  # of each choice; logged once each
    error: str | None = None
    not_used: list[str] = field(default_factory=list)  # what was sent but has no effect
    prompt: str | None = None  # these two only with log.prompts
    output: str | None = None
    handler: str | None = None  # path of the route, with names in braces; None: no route
    trace_id: str | None = None  # of the client's `traceparent`, or of this server's span
    span: RequestSpan | None = None  # with server.otlp_endpoint

    def fields(self, scope: Scope) -> dict[str, Any]:
        """The content of the log line, without unknown values."""
        known = {
            "request_id": self.request_id,
            "route": f"{scope['method']} {scope['path']}",
            "status": self.status,
            "ms": round((time.perf_counter() - self.started) * 1000, 1),
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
            "finish_reason": ",".join(dict.fromkeys(self.finish_reasons)) or None,
            "error": self.error,
            "not_used": ",".join(self.not_used) or None,
            "trace_id": self.trace_id,
            "prompt": self.prompt,
            "output": self.output,
        }
        return {name: value for name, value in known.items() if value is not None}


def record_of(scope: Scope) -> RequestRecord:
    """The record of the request that is being served."""
    record = scope[RECORD]
    assert isinstance(record, RequestRecord)
    return record


class NotedRoute:
    """ASGI middleware: notes which route a request found. It must be the innermost one: others may
    hand on a copy of the scope."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._app(scope, receive, send)
        finally:
            if scope["type"] == "http" and "route" in scope:
                record_of(scope).handler = scope["route"].path


class RequestLog:
    """ASGI middleware. Sets `x-request-id` and the warning header, counts open requests, answers
    500 when the application fails before it has answered, and logs one line when the response is
    complete."""

    def __init__(
        self,
        app: ASGIApp,
        state: ServerState,
        manner_of: Callable[[str], ErrorManner],
        count: Callable[[str | None, str, int], None],
        tracing: Tracing | None = None,
    ) -> None:
        """`manner_of`: how the route of a path tells of errors. `count` is told of each answer:
        path of the route, method, status. `tracing`: None for no spans."""
        self._app = app
        self._count = count
        self._state = state
        self._manner_of = manner_of
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        manner = self._manner_of(scope["path"])
        record = scope[RECORD] = RequestRecord(request_id(scope["headers"]), manner)
        self._trace(record, scope)

        async def receive_all() -> Message:
            message = await receive()
            if not message.get("more_body", False):
                request.arrived()
            return message

        async def send_with_id(message: Message) -> None:
            request.arrived()
            if message["type"] == "http.response.start":
                record.status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = headers[manner.id_header] = record.request_id
                if record.not_used:
                    headers[WARNING_HEADER] = _warning(record.not_used)
            await send(message)

        with self._state.request(_has_body(scope["headers"])) as request:
            try:
                await self._app(scope, receive_all, send_with_id)
            except Exception:
                logger.exception("request %s failed", record.request_id)
                record.error = record.error or "internal error"
                if record.status is None:
                    message = f"Internal error; its request id is {record.request_id}"
                    await send_error(server_error(message), scope, send_with_id)
            finally:
                if record.status is not None and scope["path"] not in QUIET:
                    self._count(record.handler, scope["method"], record.status)
                if record.span is not None:
                    record.span.end(record.status, record.error)
                _write(record, scope)

    def _trace(self, record: RequestRecord, scope: Scope) -> None:
        """Note the trace of this request, and begin its span if spans are wanted."""
        record.trace_id = trace_of(scope["headers"])
        if self._tracing is not None and scope["path"] not in QUIET:
            record.span = self._tracing.begin(scope)
            record.trace_id = record.span.trace_id
        CURRENT_TRACE.set(record.trace_id)


def _has_body(headers: list[tuple[bytes, bytes]]) -> bool:
    return any(
        name == b"transfer-encoding" or (name == b"content-length" and value != b"0")
        for name, value in headers
    )


def request_id(headers: list[tuple[bytes, bytes]]) -> str:
    """The client's id, if it is printable ASCII of at most 128 characters, else a new one."""
    for name, value in headers:
        if name == ID_HEADER and 0 < len(value) <= MAX_ID_LENGTH:
            if all(0x20 <= letter < 0x7F for letter in value):
                return value.decode("ascii")
            break
    return f"req_{uuid.uuid4().hex}"


async def send_error(error: ApiError, scope: Scope, send: Send) -> None:
    """Send an error as a complete response, from code outside the routes."""
    record = record_of(scope)
    headers, body = error_response(error, record.manner.body(error, record.request_id))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def error_response(error: ApiError, body: bytes) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """Headers and body of an error."""
    headers = {"content-type": "application/json", "content-length": str(len(body))}
    raw = [(name.encode(), value.encode()) for name, value in (headers | error.headers).items()]
    return raw, body


def _warning(names: Sequence[str]) -> str:
    """The value of the warning header: printable ASCII."""
    text = json.dumps("not used: " + ", ".join(names))[1:-1]
    return text if len(text) <= MAX_WARNING else text[:MAX_WARNING] + "..."


def _write(record: RequestRecord, scope: Scope) -> None:
    level = logging.DEBUG if scope["path"] in QUIET else logging.INFO
    if logger.isEnabledFor(level):
        fields = record.fields(scope)
        text = " ".join(f"{name}={_quoted(value)}" for name, value in fields.items())
        logger.log(level, "request %s", text, extra={"fields": {"event": "request"} | fields})


def _quoted(value: Any) -> str:
    """The value as one word, so that it cannot look like another field or line."""
    text = str(value)
    plain = text.isascii() and text.isprintable() and not any(mark in text for mark in ' "=')
    return text if plain and text else json.dumps(text)
