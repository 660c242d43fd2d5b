"""The unread events of one request, and a way past the task that reads them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from engine.messages import Finished, Tokens

Event = Tokens | Finished


class Inbox:
    """Events in order; iterating ends after the `Finished`. One task reads them.

    To wake a task for every token of every stream costs more than what it does with the token. So
    while the reader waits and nothing is unread, `shortcut` is called with each event, at once; it
    returns False for those that the reader must take. What it raises, the reader gets.
    """

    def __init__(self) -> None:
        self.shortcut: Callable[[Event], bool] | None = None
        self._items: deque[Event | Exception] = deque()
        self._reader: asyncio.Future[None] | None = None  # while it waits
        self._is_over = False

    def __len__(self) -> int:
        """How many are unread."""
        return len(self._items)

    def put(self, event: Event) -> None:
        reader = self._reader
        if reader is None or reader.done():
            self._items.append(event)
            return
        if self.shortcut is None:
            self._wake(reader, event)
            return
        try:
            if not self.shortcut(event):
                self._wake(reader, event)
        except Exception as error:  # noqa: BLE001  # raised again by `__anext__`
            self._wake(reader, error)

    def clear(self) -> None:
        """Forget what is unread."""
        self._items.clear()

    def __aiter__(self) -> Inbox:
        return self

    async def __anext__(self) -> Event:
        if self._is_over:
            raise StopAsyncIteration
        if not self._items:
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        item = self._items.popleft()
        if isinstance(item, Exception):
            self._is_over = True
            raise item
        self._is_over = isinstance(item, Finished)
        return item

    def _wake(self, reader: asyncio.Future[None], item: Event | Exception) -> None:
        self._items.append(item)
        if not reader.done():  # the shortcut may have put an event, too
            reader.set_result(None)
