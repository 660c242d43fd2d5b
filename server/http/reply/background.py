"""Work for clients that goes on without a connection."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

from server.http.admission.state import ServerState
from server.http.errors import rate_limited


class Background:
    """Tasks by name. A server that drains waits for them as for open requests."""

    def __init__(self, state: ServerState, most: int, retry_after: int) -> None:
        self._state = state
        self._most = most
        self._retry_after = retry_after
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._num_reserved = 0

    def is_running(self, name: str) -> bool:
        return name in self._tasks

    @contextmanager
    def room(self) -> Iterator[None]:
        """Room for one task, which may be started inside this block. ApiError 429 if there is
        none."""
        taken = len(self._tasks) + self._num_reserved
        if taken >= self._most:
            raise rate_limited(
                f"Rate limit reached: {taken} responses are made in the background, at "
                f"most {self._most} may (server.max_background_responses); try again later",
                self._retry_after,
            )
        self._num_reserved += 1
        try:
            yield
        finally:
            self._num_reserved -= 1

    def start(
        self, name: str, work: Callable[[], Coroutine[Any, Any, None]], close: Callable[[], None]
    ) -> None:
        """Run `work`, which handles its own errors, then `close`, even if it is cancelled before it
        begins."""

        def end(_: asyncio.Task[None]) -> None:
            try:
                close()  # still named as running: its answer stays stored meanwhile
            finally:
                del self._tasks[name]

        task = asyncio.create_task(self._run(work))
        self._tasks[name] = task
        task.add_done_callback(end)

    async def cancel(self, name: str) -> None:
        """Cancel a task and wait for its end. Unknown names are no error."""
        task = self._tasks.get(name)
        if task is not None:
            task.cancel()
            await asyncio.wait([task])

    def close(self) -> None:
        for task in self._tasks.values():
            task.cancel()

    async def _run(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        with self._state.request(has_body=False):
            await work()
