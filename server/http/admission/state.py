"""Whether the server is draining, and how many requests are open."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager


class ServerState:
    """Used only on the event loop's thread. Draining cannot be undone."""

    def __init__(self) -> None:
        self._draining = False
        self._num_open = 0
        self._num_arriving = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def draining(self) -> bool:
        return self._draining

    @property
    def num_open(self) -> int:
        """HTTP requests that arrived completely and whose response is not complete."""
        return self._num_open - self._num_arriving

    def start_draining(self) -> None:
        """Refuse new generations with 503; open ones continue."""
        self._draining = True

    async def wait_idle(self) -> None:
        """Return once no whole request is open."""
        await self._idle.wait()

    @contextmanager
    def request(self, has_body: bool) -> Iterator[OpenRequest]:
        """Counts an HTTP request as open inside this block, once its body has arrived."""
        request = OpenRequest(self, has_body)
        self._count(1, int(has_body))
        try:
            yield request
        finally:
            request.arrived()
            self._count(-1, 0)

    def _count(self, num_open: int, num_arriving: int) -> None:
        self._num_open += num_open
        self._num_arriving += num_arriving
        if self.num_open:
            self._idle.clear()
        else:
            self._idle.set()


class OpenRequest:
    """An HTTP request; nobody waits for one whose body has not arrived."""

    def __init__(self, state: ServerState, arriving: bool) -> None:
        self._state = state
        self._arriving = arriving

    def arrived(self) -> None:
        """The whole body is here, or is not needed. May be repeated."""
        if self._arriving:
            self._arriving = False
            self._state._count(0, -1)
