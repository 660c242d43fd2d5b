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
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def draining(self) -> bool:
        return self._draining

    @property
    def num_open(self) -> int:
        """HTTP requests whose response is not complete."""
        return self._num_open

    def start_draining(self) -> None:
        """Refuse new generations with 503; open ones continue."""
        self._draining = True

    async def wait_idle(self) -> None:
        """Return once no request is open."""
        await self._idle.wait()

    @contextmanager
    def request(self) -> Iterator[None]:
        """Counts an HTTP request as open inside this block."""
        self._num_open += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._num_open -= 1
            if self._num_open == 0:
                self._idle.set()
