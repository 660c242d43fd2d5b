"""Bounds the bodies of requests: each of them, and all that are held at a time."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from configs.schema import ServerConfig
from server.http.errors import ApiError, invalid, rate_limited
from server.http.middleware.request_log import send_error
from server.http.monitoring.metrics import BODIES, Metrics

HOLD = "aerie.body"  # key in the ASGI scope


class BodyHold:
    """The bytes that the body of one request takes, counted together with those of all others."""

    def __init__(self, limit: BodyLimit) -> None:
        self._limit = limit
        self.num_bytes = 0

    def take(self, num_bytes: int) -> None:
        """Count further bytes.

        Raises:
            ApiError: 413 for a body above `max_body_bytes`, 429 when all bodies together exceed
                `max_pending_body_bytes`.
        """
        self.num_bytes += num_bytes
        self._limit.check(self.num_bytes, num_bytes)

    def release(self) -> None:
        """The body is no longer needed. May be repeated."""
        self._limit.pending -= self.num_bytes
        self.num_bytes = 0


class BodyLimit:
    """Middleware: refuses bodies by their content-length or as they arrive. A body counts until the
    response begins; then its prompt is tokenised."""

    def __init__(self, app: ASGIApp, limits: ServerConfig, metrics: Metrics) -> None:
        self._app = app
        self._limits = limits
        self._metrics = metrics
        self.pending = 0  # bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        problem = self._announced(scope["headers"])
        if problem is not None:
            await send_error(problem, scope, send)
            return
        hold = scope[HOLD] = BodyHold(self)

        async def counted() -> Message:
            message = await receive()
            hold.take(len(message.get("body", b"")))
            return message

        async def send_and_release(message: Message) -> None:
            hold.release()
            await send(message)

        try:
            await self._app(scope, counted, send_and_release)
        finally:
            hold.release()

    def check(self, of_request: int, newest: int) -> None:
        """Count `newest` bytes of a body that has `of_request`. ApiError: see `BodyHold.take`."""
        self.pending += newest
        limits = self._limits
        if of_request > limits.max_body_bytes:
            raise self._too_large(f"more than {limits.max_body_bytes}")
        # One body alone is always allowed, as a request is on an idle server.
        if self.pending > limits.max_pending_body_bytes and self.pending > of_request:
            self._metrics.reject(BODIES)
            raise rate_limited(
                "Rate limit reached: the bodies of open requests have more than "
                f"{limits.max_pending_body_bytes} bytes (server.max_pending_body_bytes); try again "
                "later",
                limits.retry_after,
                closes=True,
            )

    def _announced(self, headers: list[tuple[bytes, bytes]]) -> ApiError | None:
        for name, value in headers:
            if name == b"content-length":
                if not value.isdigit():
                    return invalid("The content-length header is not a number")
                if len(value) > 18 or int(value) > self._limits.max_body_bytes:
                    return self._too_large(value[:18].decode())
        return None

    def _too_large(self, size: str) -> ApiError:
        message = (
            f"The request body has {size} bytes: at most {self._limits.max_body_bytes} are "
            "accepted (server.max_body_bytes)"
        )
        closes = {"connection": "close"}  # the rest of the body is not wanted
        return ApiError(
            413, message, "invalid_request_error", code="request_too_large", headers=closes
        )


def hold_of(scope: Scope) -> BodyHold:
    """The bytes that the body of this request takes."""
    hold = scope[HOLD]
    assert isinstance(hold, BodyHold)
    return hold
