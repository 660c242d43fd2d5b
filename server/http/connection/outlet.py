"""What a connection writes to: it ends clients that do not read, and closes without losing the
answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

TICK = 1.0  # seconds between looks at a client that has not read everything
SLOWEST = 1024  # bytes per second that a client must read
DRAIN_TIMEOUT = 2.0  # seconds without reading, while the server drains
# How long, and how much, of an unfinished request is read on after its answer.
LINGER, LINGER_BYTES = 2.0, 16 * 2**20  # seconds, bytes


class Outlet:
    """Takes the place of a transport where responses are written."""

    def __init__(
        self, transport: asyncio.Transport, timeout: float, draining: Callable[[], bool]
    ) -> None:
        """A client may read nothing for `timeout` seconds; when `draining`, for DRAIN_TIMEOUT."""
        self._transport = transport
        self._timeout = timeout
        self._draining = draining
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._written = 0
        self._mark = (0.0, 0)  # a time, and the bytes that the client had taken then
        self.lingering = False
        self._discarded = 0

    def write(self, data: bytes) -> None:
        self._transport.write(data)
        self._written += len(data)
        if self._timer is None and self._transport.get_write_buffer_size():
            self._mark = (self._loop.time(), self._taken)
            self._watch()

    def is_closing(self) -> bool:
        return self.lingering or self._transport.is_closing()

    def close(self) -> None:
        """Close once everything is written."""
        self._transport.close()

    def linger(self) -> None:
        """Close, but first let the client finish sending: a connection that is closed while bytes
        arrive is reset, and the client loses the answer that it was sent."""
        if self.is_closing():
            return
        self.lingering = True
        if self._transport.can_write_eof():
            self._transport.write_eof()
        self._transport.resume_reading()
        self._loop.call_later(LINGER, self._transport.close)

    def discard(self, num_bytes: int) -> None:
        """Bytes came after the answer. Of very many, the client may lose it."""
        self._discarded += num_bytes
        if self._discarded > LINGER_BYTES:
            self._transport.close()

    def stop(self) -> None:
        """The connection is lost."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    @property
    def _taken(self) -> int:
        return self._written - self._transport.get_write_buffer_size()

    def _watch(self) -> None:
        self._timer = self._loop.call_later(min(TICK, self._timeout), self._look)

    def _look(self) -> None:
        self._timer = None
        if not self._transport.get_write_buffer_size():
            return
        now, taken = self._loop.time(), self._taken
        since, before = self._mark
        if taken - before >= SLOWEST * (now - since):
            self._mark = (now, taken)
        limit = min(self._timeout, DRAIN_TIMEOUT) if self._draining() else self._timeout
        if now - self._mark[0] >= limit:
            self._transport.abort()
        else:
            self._watch()
