"""Requests between engines that compute prompts and engines that decode.

A request is reserved where it will decode; then its prompt is computed elsewhere, and handed over
with its first token. If an engine is lost, its requests go on at another one, with the tokens they
have: the text depends on nothing else.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import msgspec

from engine.messages import (
    DraftSwapped,
    EngineInfo,
    EngineStats,
    ErrorCode,
    Finished,
    HandedOver,
    Handover,
    PagesSent,
    PeerLost,
    Reserved,
    Resume,
    Submit,
    TakePages,
    Tokens,
    TransferEvent,
)
from engine.request import FinishReason, Request
from server.http.engine_client import StepSizes
from server.process.channel.client import NO_ENGINE, Stream, ZmqEngineClient
from server.process.channel.totals import total

MAX_LOST = 2  # engines that a request may lose: it may be what ends them
NO_SWAPS = "with parallel.roles the draft head cannot be changed while the server runs"


@dataclass(frozen=True, slots=True)
class Peer:
    """An engine of a role."""

    client: ZmqEngineClient
    number: int  # among the engines of its role

    @property
    def is_ready(self) -> bool:
        return self.client.info is not None


class RolesClient:
    """Implements `EngineClient` over engines of two roles."""

    def __init__(
        self, prefill: Sequence[ZmqEngineClient], decode: Sequence[ZmqEngineClient]
    ) -> None:
        self._prefill = [Peer(client, number) for number, client in enumerate(prefill)]
        self._decode = [Peer(client, number) for number, client in enumerate(decode)]
        self._routes: dict[str, _Route] = {}

    @property
    def _clients(self) -> list[ZmqEngineClient]:
        return [peer.client for peer in (*self._decode, *self._prefill)]

    @property
    def info(self) -> EngineInfo | None:
        """Facts of an engine that is ready, of one that decodes if there is one. Requests must fit
        into all of them."""
        found = [client.info for client in self._clients if client.info is not None]
        if not found:
            return None
        shortest = min(info.max_model_len for info in found)
        if shortest == found[0].max_model_len:
            return found[0]
        return msgspec.structs.replace(found[0], max_model_len=shortest)

    @property
    def stats(self) -> EngineStats | None:
        """Of all engines together, also of those that have ended: so no count falls."""
        found = [client.stats_so_far for client in self._clients]
        return total([stats for stats in found if stats is not None])

    @property
    def step_sizes(self) -> StepSizes:
        """Of the steps of all engines."""
        return StepSizes.together([client.step_sizes for client in self._clients])

    @property
    def num_restarts(self) -> int:
        """Starts of engines after the first of each."""
        return sum(client.num_restarts for client in self._clients)

    async def wait_ready(self) -> EngineInfo:
        """Return once all engines can take requests."""
        found = await asyncio.gather(*(client.wait_ready() for client in self._clients))
        return found[0]

    def submit(self, request: Request) -> AsyncIterator[Tokens | Finished]:
        assert request.request_id not in self._routes, "request ids are used once"
        route = self._routes[request.request_id] = _Route(self, request)
        route.start(route.failed(NO_ENGINE))
        return route.stream.inbox

    def abort(self, request_id: str) -> None:
        route = self._routes.get(request_id)
        if route is not None:
            route.abort()

    async def swap_draft(self, path: str | None) -> DraftSwapped:  # noqa: ARG002
        return DraftSwapped("", error=NO_SWAPS)

    def close(self) -> None:
        for client in self._clients:
            client.close()

    def prefill_peer(self) -> Peer | None:
        """The engine that computes the next prompt; None if none is ready."""
        return _least_busy(self._prefill)

    def decode_peer(self) -> Peer | None:
        """The engine that decodes the next request; None if none is ready."""
        return _least_busy(self._decode)

    def ended(self, request_id: str) -> None:
        """A route has got its last event."""
        del self._routes[request_id]


class _Route:
    """One request on its way. `decode` is where it is reserved or decodes, `prefill` where its
    prompt is computed, or where it decodes if no other engine is ready."""

    def __init__(self, engines: RolesClient, request: Request) -> None:
        self.request = request
        self.stream = Stream(request)
        self._engines = engines
        self._output: list[int] = []
        self._decode: _Leg | None = None
        self._prefill: _Leg | None = None
        self._num_lost = 0
        self._is_aborted = False

    def start(self, otherwise: Finished) -> None:
        """Submit the request, with the tokens it has; it ends as said if no engine is ready."""
        prefill, decode = self._engines.prefill_peer(), self._engines.decode_peer()
        output_ids = tuple(self._output)
        if decode is not None:
            message = Submit(self.request, output_ids=output_ids, reserve=prefill is not None)
            self._decode = _Leg(self, decode)
            decode.client.open(message, self._decode)
        elif prefill is not None:
            self._prefill = _Leg(self, prefill)
            prefill.client.open(Submit(self.request, output_ids=output_ids), self._prefill)
        else:
            self._end(otherwise)

    def abort(self) -> None:
        """Tell all engines that have the request."""
        self._is_aborted = True
        for leg in (self._decode, self._prefill):
            if leg is not None:
                leg.peer.client.abort(self.request.request_id)

    def failed(self, reason: str, code: ErrorCode | None = None) -> Finished:
        return self.stream.failed(reason, code)

    def heard(self, leg: _Leg, event: Tokens | Finished) -> bool:
        """Take an event of a leg. False if its engine must be told to stop."""
        if leg not in (self._decode, self._prefill):
            return True  # it has ended here already
        if isinstance(event, Tokens):
            self._output += event.token_ids
            return self.stream.put(event)
        if leg.is_lost(event):
            self._lose(leg, event)
        else:
            self._leave(leg)
            self.abort()
            self._end(event)
        return True

    def transferred(self, leg: _Leg, event: TransferEvent) -> None:
        """Take what the engine of a leg says to the other one."""
        if isinstance(event, HandedOver):
            leg.peer.client.forget(event.request_id)
        if leg not in (self._decode, self._prefill):
            return
        if isinstance(event, Reserved):
            self._compute_prompt(leg, event)
        elif isinstance(event, HandedOver):
            self._prefill = None
            self._resume(event)
        elif self._decode is not None:
            self._decode.peer.client.tell(_take_pages(leg, event))

    def _compute_prompt(self, leg: _Leg, event: Reserved) -> None:
        """Let another engine compute the prompt, or this one if there is none."""
        prefill = self._engines.prefill_peer()
        if prefill is None:
            self._resume(None)
            return
        self._prefill = _Leg(self, prefill)
        message = Submit(
            # The other engine has room for the pages of one more token.
            msgspec.structs.replace(self.request, max_draft_nodes=0),
            output_ids=tuple(self._output),
            handover=Handover(leg.peer.number, event.first_block, event.places, event.endpoint),
        )
        prefill.client.open(message, self._prefill)

    def _resume(self, handed: HandedOver | None) -> None:
        if self._decode is None:
            self._num_lost = max(self._num_lost, 1)
            self.start(self.failed(NO_ENGINE))
            return
        message = Resume(self.request.request_id, tuple(self._output), handed)
        self._decode.peer.client.tell(message)

    def _lose(self, leg: _Leg, event: Finished) -> None:
        """Go on without the engine of a leg, or end the request with its event."""
        self._num_lost += event.error_code is not ErrorCode.TRANSFER  # no engine has ended
        was_decoding = leg is self._decode
        self._leave(leg)
        if was_decoding and self._prefill is not None:
            self._prefill.peer.client.tell(PeerLost(leg.peer.number))
        elif self._decode is not None:
            self._resume(None)
        elif self._num_lost < MAX_LOST and not self._is_aborted:
            self.start(event)
        else:
            self._end(event)

    def _leave(self, leg: _Leg) -> None:
        if leg is self._decode:
            self._decode = None
        else:
            self._prefill = None

    def _end(self, event: Finished) -> None:
        self._decode = self._prefill = None
        self._engines.ended(self.request.request_id)
        self.stream.put(event)


class _Leg:
    """A route's part at one engine; a `Listener`."""

    def __init__(self, route: _Route, peer: Peer) -> None:
        self.peer = peer
        self._route = route

    @property
    def request(self) -> Request:
        return self._route.request

    def put(self, event: Tokens | Finished) -> bool:
        return self._route.heard(self, event)

    def transfer(self, event: TransferEvent) -> None:
        self._route.transferred(self, event)

    def failed(self, reason: str, code: ErrorCode | None = None) -> Finished:
        return self._route.failed(reason, code)

    def is_lost(self, event: Finished) -> bool:
        """Whether the request has ended because its engine has, or cannot reach the other one."""
        if event.reason is not FinishReason.ERROR:
            return False
        is_ended = event.error_code is None and not self.peer.is_ready
        return is_ended or event.error_code is ErrorCode.TRANSFER


def _take_pages(leg: _Leg, event: PagesSent) -> TakePages:
    return TakePages(event.request_id, leg.peer.number, event.first_block, event.num_blocks)


def _least_busy(peers: Sequence[Peer]) -> Peer | None:
    ready = [peer for peer in peers if peer.is_ready]
    return min(ready, key=lambda peer: peer.client.num_open, default=None)
