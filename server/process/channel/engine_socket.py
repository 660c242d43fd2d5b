"""The HTTP process's end of the ZeroMQ pair, on an event loop.

`zmq.asyncio` would do the same with several futures and callbacks for every message, which took
most of what this process spent on receiving a token.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable

import zmq

from server.process.channel.wire import unbounded

# After so many frames, or seconds, other callbacks of the event loop have their turn.
MOST_AT_ONCE, TURN = 64, 0.002


class EngineSocket:
    """Listens at an endpoint for one engine; `take` is called with every frame that it sends, and
    must not raise.

    ZeroMQ's descriptor says that something may have happened, not that a frame is there, and says
    it once: what came during a call of ours is found only by asking. So every look, and every
    send, goes on until no frame is left.
    """

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str, take: Callable[[bytes], None]
    ) -> None:
        """Raises zmq.ZMQError if there can be no socket at `endpoint`. Needs a running loop."""
        self._take = take
        self._loop = asyncio.get_running_loop()
        self._socket: zmq.Socket[bytes] = context.socket(zmq.PAIR)
        unbounded(self._socket)
        try:
            self._socket.bind(endpoint)
        except zmq.ZMQError:
            self._socket.close()
            raise
        self._listens = True
        self._loop.add_reader(self._socket.FD, self._look)

    def send(self, frame: bytes) -> None:
        """Queue a frame; the queue has no limit, so that this never waits. What is for an engine
        that has not connected yet, or is gone, is dropped: it has no requests."""
        with contextlib.suppress(zmq.Again):
            self._socket.send(frame, zmq.NOBLOCK)
        self._look()

    def stop_listening(self) -> None:
        """Take no further frames."""
        if self._listens:
            self._listens = False
            self._loop.remove_reader(self._socket.FD)

    def close(self) -> None:
        self.stop_listening()
        self._socket.close()

    def _look(self) -> None:
        """Take the frames that have come."""
        end = time.perf_counter() + TURN
        for _ in range(MOST_AT_ONCE):
            if not self._listens:
                return
            try:
                frame = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._take(frame)
            if time.perf_counter() > end:
                break
        self._loop.call_soon(self._look)
