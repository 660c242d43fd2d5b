"""The HTTP process's end of the ZeroMQ pair, on both event loops."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import uvloop
import zmq

from server.process.channel.engine_socket import MOST_AT_ONCE, EngineSocket
from tests.support.waiting import DEADLINE

Loop = Callable[[], asyncio.AbstractEventLoop]
LOOPS = (asyncio.new_event_loop, uvloop.new_event_loop)


class Pair:
    """An `EngineSocket`, the frames that it took, and the engine's end."""

    def __init__(self, folder: Path) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._endpoint = f"ipc://{folder / 'engine'}"
        self.taken: list[bytes] = []
        self.changed = asyncio.Event()
        self.most = 10**9
        self.socket = EngineSocket(self._context, self._endpoint, self._take)
        self._engine: zmq.Socket[bytes] | None = None

    def _take(self, frame: bytes) -> None:
        self.taken.append(frame)
        if len(self.taken) == self.most:
            self.socket.stop_listening()
        self.changed.set()

    def connect(self) -> zmq.Socket[bytes]:
        self._engine = self._context.socket(zmq.PAIR)
        self._engine.setsockopt(zmq.RCVTIMEO, int(1000 * DEADLINE))
        self._engine.connect(self._endpoint)
        return self._engine

    async def until(self, count: int) -> None:
        while len(self.taken) < count:
            self.changed.clear()
            await asyncio.wait_for(self.changed.wait(), DEADLINE)

    def close(self) -> None:
        self.socket.close()
        if self._engine is not None:
            self._engine.close(linger=0)
        self._context.term()


def run(loop: Loop, folder: Path, scene: Callable[[Pair], Awaitable[None]]) -> None:
    async def main() -> None:
        with contextlib.closing(Pair(folder)) as pair:
            await scene(pair)

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(main())


@pytest.fixture(params=LOOPS, ids=["asyncio", "uvloop"])
def loop(request: pytest.FixtureRequest) -> Loop:
    chosen: Loop = request.param
    return chosen


def frames(first: int, last: int) -> list[bytes]:
    return [str(number).encode() for number in range(first, last)]


def test_all_frames_come_in_order_also_those_that_come_together(loop: Loop, tmp_path: Path) -> None:
    count = 5 * MOST_AT_ONCE + 1

    async def scene(pair: Pair) -> None:
        engine = pair.connect()
        for frame in frames(0, count):
            engine.send(frame)
        await pair.until(count)
        for number in range(count, count + 200):  # answered one by one
            pair.socket.send(str(number).encode())
            engine.send(await asyncio.to_thread(engine.recv))
            await pair.until(number + 1)
        assert pair.taken == frames(0, count + 200)

    run(loop, tmp_path, scene)


def test_a_frame_for_no_engine_is_dropped_and_does_not_block(loop: Loop, tmp_path: Path) -> None:
    async def scene(pair: Pair) -> None:
        pair.socket.send(b"dropped")
        engine = pair.connect()
        engine.send(b"here")
        await pair.until(1)
        pair.socket.send(b"welcome")
        assert engine.recv() == b"welcome"

    run(loop, tmp_path, scene)


def test_nothing_is_taken_after_the_end_of_listening(loop: Loop, tmp_path: Path) -> None:
    async def scene(pair: Pair) -> None:
        engine = pair.connect()
        pair.most = 2
        for frame in frames(0, 5):
            engine.send(frame)
        await pair.until(2)
        pair.socket.send(b"end")
        assert engine.recv() == b"end"
        assert pair.taken == frames(0, 2)

    run(loop, tmp_path, scene)


def test_an_endpoint_that_cannot_be_is_refused(tmp_path: Path) -> None:
    async def main() -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        with pytest.raises(zmq.ZMQError):
            EngineSocket(context, f"ipc://{tmp_path / 'none' / 'engine'}", print)
        context.term()  # would wait for a socket that is left open

    asyncio.run(main())
