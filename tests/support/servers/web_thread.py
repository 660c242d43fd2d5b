"""An application with its own port, served by a thread of this process."""

from __future__ import annotations

import asyncio
import socket
import threading
from types import TracebackType
from typing import Self

from server.process.web import WebServer
from tests.support.engines.scripted_engine import Event
from tests.support.servers.http_server import Server
from tests.support.waiting import DEADLINE


class WebThread:
    """Serves the application of a `Server` as a context manager; `url` is where."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self._web = WebServer(server.app)
        self._socket = socket.create_server(("127.0.0.1", 0))
        root = server.config.server.root_path
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}{root}/"
        self._loop: asyncio.AbstractEventLoop | None = None
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._started.wait(DEADLINE)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._loop is not None
        self._web.should_exit = True
        self._loop.call_soon_threadsafe(self._web.drop_connections)
        self._thread.join(DEADLINE)
        self._socket.close()

    def feed(self, event: Event) -> None:
        """Add an event to a request that is still open, in the loop that serves it."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._feed, event)

    def _feed(self, event: Event) -> None:
        if event.request_id in self.server.engine.open_ids:  # it may have been aborted
            self.server.engine.feed(event)

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._socket.listen()  # connections wait until the server has started
        self._started.set()
        await self._web.serve([self._socket])
