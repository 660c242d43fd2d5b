"""Engines of both roles in one process, with the client that the HTTP process uses for them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from typing import cast

from drafter.proposer import DraftProposer
from engine.completion import Completion
from engine.core import EngineCore
from engine.messages import (
    Abort,
    EngineInfo,
    EngineMessage,
    EngineStats,
    Finished,
    HandedOver,
    PagesSent,
    PeerLost,
    Reserved,
    Resume,
    Submit,
    TakePages,
    Tokens,
)
from engine.request import Request
from engine.runner.runner import ModelRunner
from server.assembly.roles.peers import peers_of
from server.assembly.roles.role import Role
from server.process.channel.client import ENGINE_LOST, Listener, ZmqEngineClient
from server.process.roles.client import RolesClient
from tests.support.waiting import DEADLINE


@dataclass(eq=False)
class LocalClient:
    """Stands for a `ZmqEngineClient` of an engine in this process."""

    core: EngineCore
    info: EngineInfo | None = None
    stats: EngineStats | None = None
    said: list[EngineMessage] = field(default_factory=list)
    streams: dict[str, Listener] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.info = self.core.info

    @property
    def num_open(self) -> int:
        return len(self.streams)

    def open(self, message: Submit, listener: Listener) -> None:
        assert message.request.request_id not in self.streams
        self.streams[message.request.request_id] = listener
        self.core.add(message)

    def abort(self, request_id: str) -> None:
        if request_id in self.streams and self.info is not None:
            self.core.add(Abort(request_id))

    def forget(self, request_id: str) -> None:
        del self.streams[request_id]

    def tell(self, message: TakePages | Resume | PeerLost) -> None:
        if self.info is not None:
            self.core.add(message)

    def step(self) -> None:
        """One step, if there is anything to do; its events go to the router."""
        if self.info is None or not self.core.has_work():
            return
        for event in self.core.step():
            self.said.append(event)
            if isinstance(event, Reserved | PagesSent | HandedOver):
                self.streams[event.request_id].transfer(event)
            elif isinstance(event, Tokens | Finished):
                self.streams[event.request_id].put(event)
                if isinstance(event, Finished):
                    del self.streams[event.request_id]
            elif isinstance(event, EngineStats):
                self.stats = event
        self.core.audit()

    def die(self) -> None:
        """The process of the engine ends."""
        self.info = None
        for listener in list(self.streams.values()):
            listener.put(listener.failed(ENGINE_LOST))
        self.streams.clear()


class RoleLab:
    """A router and its engines, all in this thread."""

    def __init__(self, prefill: Iterable[LocalClient], decode: Iterable[LocalClient]) -> None:
        self.prefill, self.decode = list(prefill), list(decode)
        clients = cast("list[list[ZmqEngineClient]]", [self.prefill, self.decode])
        self.router = RolesClient(*clients)
        self._events: dict[str, AsyncIterator[Tokens | Finished]] = {}

    def submit(self, request: Request) -> None:
        self._events[request.request_id] = self.router.submit(request)

    def step(self) -> None:
        for client in (*self.decode, *self.prefill):
            client.step()

    def finish(self) -> dict[str, Completion]:
        """Run until idle; completions by request id. No blocks may be left in use."""
        clients = (*self.decode, *self.prefill)
        while any(client.info is not None and client.core.has_work() for client in clients):
            self.step()
        found = asyncio.run(self._completions())
        for client in clients:
            client.core.audit()
            assert client.info is None or client.core.stats().kv_usage == 0
            assert not client.streams
        return found

    async def _completions(self) -> dict[str, Completion]:
        found = {}
        for request_id, events in self._events.items():
            found[request_id] = Completion()
            async for event in events:
                found[request_id].take(event)
        self._events.clear()
        return found


def joined(prefill: EngineCore, decode: EngineCore, *, shared: bool = True) -> RoleLab:
    """Two engines that share memory, as long as this process lives; or else NIXL joins them."""
    areas = {0: os.memfd_create("test-pages")} if shared else None
    for core, kind in ((decode, "decode"), (prefill, "prefill")):
        runner = core._executor
        assert isinstance(runner, ModelRunner)
        core._peers = peers_of(Role(kind, 0, 1, areas), runner, DEADLINE)
        core._scheduler.handovers.endpoint = core._peers.endpoint
        if isinstance(runner.proposer, DraftProposer):
            runner.proposer._eager = kind == "prefill"
    return RoleLab([LocalClient(prefill)], [LocalClient(decode)])
