"""An engine client and a scripted engine at the other end of its socket."""

from __future__ import annotations

import itertools
from pathlib import Path

import zmq
import zmq.asyncio

from engine.messages import ClientMessage, EngineMessage
from server.process.channel.client import ZmqEngineClient
from server.process.channel.suspects import Suspects
from server.process.channel.wire import decode_client, encode, unbounded
from tests.support.engines.scripted_engine import INFO


class Peer:
    """The engine's end of the ZeroMQ pair."""

    def __init__(self, context: zmq.asyncio.Context, endpoint: str) -> None:
        self._socket = context.socket(zmq.PAIR)
        unbounded(self._socket)
        self._socket.connect(endpoint)
        self._heard: list[ClientMessage] = []

    async def say(self, *messages: EngineMessage) -> None:
        await self._socket.send(encode(messages))

    async def hear(self, count: int) -> list[ClientMessage]:
        """The next `count` messages, in any batches."""
        while len(self._heard) < count:
            self._heard += decode_client(await self._socket.recv())
        found, self._heard = self._heard[:count], self._heard[count:]
        return found

    def close(self) -> None:
        self._socket.close()


class Pair:
    """A client and its engines, one after the other."""

    def __init__(self, folder: Path, suspects: Suspects | None = None) -> None:
        self._folder = folder
        self._numbers = itertools.count()
        self._context = zmq.asyncio.Context()
        self.client = ZmqEngineClient(suspects)

    async def engine(self) -> Peer:
        """Attach a new engine that is ready."""
        endpoint = f"ipc://{self._folder}/{next(self._numbers)}"
        self.client.attach(endpoint)
        peer = Peer(self._context, endpoint)
        await peer.say(INFO)
        assert await self.client.wait_ready() == INFO
        return peer

    def close(self) -> None:
        self.client.close()
        self._context.destroy(linger=0)
