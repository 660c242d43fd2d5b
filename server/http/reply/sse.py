"""Responses that stop when their client disconnects: server-sent events and JSON bodies."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from server.http.errors import ApiError, server_error

DONE = b"data: [DONE]\n\n"
STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
logger = logging.getLogger(__name__)
_encoder = msgspec.json.Encoder()


def event(message: msgspec.Struct) -> bytes:
    """One server-sent event."""
    return b"data: " + _encoder.encode(message) + b"\n\n"


def named_event(name: str, message: msgspec.Struct) -> bytes:
    """One server-sent event of a kind that has a name."""
    return f"event: {name}\n".encode() + event(message)


def error_event(error: ApiError) -> bytes:
    """The event of an error after the first event."""
    return b"data: " + error.body() + b"\n\n"


class _WatchedResponse(Response):
    """Runs `respond`, and cancels it when the client disconnects; always calls `close` at the end.
    `respond` may raise ApiError before it has sent anything."""

    def __init__(self, close: Callable[[], None]) -> None:
        super().__init__()
        self._close = close

    async def respond(self, send: Send) -> None:
        raise NotImplementedError

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        try:
            await _unless_disconnected(self.respond(send), receive)
        finally:
            self._close()


class EventStream(_WatchedResponse):
    """Sends events as they come, then `end`. The head of the response is sent with the first event,
    so that earlier errors get their own status; later errors end the stream with the events that
    `failure` makes of them, and without `end`."""

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        close: Callable[[], None],
        failure: Callable[[ApiError], bytes] = error_event,
        end: bytes = DONE,
    ) -> None:
        super().__init__(close)
        self._events = events
        self._failure = failure
        self._end = end

    async def respond(self, send: Send) -> None:
        started = False
        async with contextlib.aclosing(self._events) as events:
            try:
                async for data in events:
                    if not started:
                        started = True
                        await send(_start(STREAM_HEADERS))
                    await send({"type": "http.response.body", "body": data, "more_body": True})
            except ApiError as error:
                if not started:
                    raise
                await send(_last(self._failure(error)))
                return
            except Exception:
                if not started:
                    raise
                logger.exception("a stream failed after its first event")
                await send(_last(self._failure(server_error("Internal error"))))
                return
        await send(_last(self._end))


class WholeJson(_WatchedResponse):
    """Sends one JSON body when it is complete."""

    def __init__(
        self, make: Callable[[], Awaitable[msgspec.Struct]], close: Callable[[], None]
    ) -> None:
        super().__init__(close)
        self._make = make

    async def respond(self, send: Send) -> None:
        body = _encoder.encode(await self._make())
        length = (b"content-length", str(len(body)).encode())
        await send(_start([(b"content-type", b"application/json"), length]))
        await send(_last(body))


class StructResponse(Response):
    """A struct as JSON."""

    media_type = "application/json"

    def __init__(self, content: msgspec.Struct) -> None:
        super().__init__(_encoder.encode(content))


def _start(headers: list[tuple[bytes, bytes]]) -> Message:
    return {"type": "http.response.start", "status": 200, "headers": list(headers)}


def _last(body: bytes) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": False}


async def _unless_disconnected(work: Coroutine[Any, Any, None], receive: Receive) -> None:
    """Run `work` to its end, or cancel it when the client disconnects."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        if not working.done():
            working.cancel()
        watching.cancel()
        results = await asyncio.gather(working, watching, return_exceptions=True)
    failure = results[0]
    if isinstance(failure, Exception):
        raise failure


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
