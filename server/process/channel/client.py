"""The engine client of the HTTP process: streams of events over ZeroMQ."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncIterator, Callable, Collection
from typing import Protocol

import msgspec
import zmq

from engine.messages import (
    Abort,
    ClientMessage,
    DraftSwapped,
    EngineFailed,
    EngineInfo,
    EngineMessage,
    EngineStats,
    ErrorCode,
    Finished,
    HandedOver,
    PagesSent,
    PeerLost,
    Reserved,
    Resume,
    Shutdown,
    Submit,
    SwapDraft,
    TakePages,
    Tokens,
    TransferEvent,
)
from engine.request import FinishReason, Request
from server.assembly.running_requests import mark
from server.http.engine_client import StepSizes
from server.http.reply.inbox import Inbox
from server.process.channel.engine_socket import EngineSocket
from server.process.channel.suspects import Suspects
from server.process.channel.totals import total
from server.process.channel.wire import decode_engine, encode, share_prompts

ENGINE_LOST = "the engine stopped unexpectedly"
NO_ENGINE = "the engine is not running"
UNREAD = "the client reads too slowly"
MAX_UNREAD = 8192  # events of one request

logger = logging.getLogger(__name__)


class Listener(Protocol):
    """Takes the events of one request; `Stream` and the legs of a route do."""

    @property
    def request(self) -> Request: ...

    def put(self, event: Tokens | Finished) -> bool:
        """Take an event. False if the engine must be told to stop."""
        ...

    def transfer(self, event: TransferEvent) -> None:
        """Take what an engine says to engines of the other role."""
        ...

    def failed(self, reason: str, code: ErrorCode | None = None) -> Finished:
        """The last event of a request whose engine is lost."""
        ...


class ZmqEngineClient:
    """Implements `EngineClient`. Outlives engines: `attach` one, and `detach` it when it has
    ended."""

    def __init__(self, suspects: Suspects | None = None) -> None:
        """`suspects`: which requests are refused after deaths of the engine; None: none."""
        self._suspects = suspects or Suspects(0)
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket: EngineSocket | None = None
        self._outbox: list[ClientMessage] = []
        self._streams: dict[str, Listener] = {}
        self._swaps: dict[str, asyncio.Future[DraftSwapped]] = {}
        self._swap_ids = itertools.count()
        self._info: EngineInfo | None = None
        self._stats: EngineStats | None = None
        self._ended_stats: EngineStats | None = None  # counts of engines before this one
        self.step_sizes = StepSizes()
        self._ready = asyncio.Event()
        self._ready_at: float | None = None  # of the attached engine, or the last one
        self._interrupted: list[Request] = []  # open when the engine said that it fails
        self.num_restarts = 0
        self.num_heard = 0  # batches of messages
        self.on_busy: Callable[[bool], None] | None = None  # told when streams begin, and are over

    @property
    def info(self) -> EngineInfo | None:
        return self._info

    @property
    def stats(self) -> EngineStats | None:
        return self._stats

    @property
    def stats_so_far(self) -> EngineStats | None:
        """Those with the counts of earlier engines."""
        return total([each for each in (self._ended_stats, self._stats) if each is not None])

    @property
    def was_ready(self) -> bool:
        """Whether the attached engine, or the last one, ever was ready."""
        return self._ready_at is not None

    @property
    def served(self) -> float:
        """Seconds since that engine was ready; 0 if it never was."""
        return 0.0 if self._ready_at is None else time.monotonic() - self._ready_at

    @property
    def has_failed(self) -> bool:
        """Whether the attached engine has said that it ends."""
        return self.was_ready and self._info is None

    @property
    def is_loading(self) -> bool:
        """Whether an engine is attached that never was ready."""
        return self._socket is not None and not self.was_ready

    @property
    def awaits_engine(self) -> bool:
        """Whether the engine has work, so that it must send something before long."""
        return self.has_failed or bool(self._info and (self._streams or self._swaps))

    async def wait_ready(self) -> EngineInfo:
        """Return once the attached engine can take requests."""
        await self._ready.wait()
        assert self._info is not None
        return self._info

    def attach(self, endpoint: str) -> None:
        """Listen at `endpoint` for a new engine to connect. zmq.ZMQError if that cannot be."""
        assert self._socket is None
        self._ready_at = None
        self._socket = EngineSocket(self._context, endpoint, self._hear)

    def detach(self, reason: str = ENGINE_LOST, code: ErrorCode | None = None) -> None:
        """The engine has ended: every open stream ends with an error."""
        self._close_for_requests()
        self._outbox.clear()
        if self._socket is not None:
            self._socket.close()
        self._socket = None
        for stream in list(self._streams.values()):
            self._deliver(stream.failed(reason, code))
        swaps, self._swaps = self._swaps, {}
        for answer in swaps.values():
            if not answer.done():
                answer.set_exception(ConnectionError(reason))

    def suspect(self, running: Collection[bytes]) -> None:
        """The engine has died; `running` are the marks of what it ran. Call it before `detach`."""
        open_now = [stream.request for stream in self._streams.values()]
        found = [*self._interrupted, *open_now]
        self._suspects.engine_died(each for each in found if mark(each.request_id) in running)
        self._interrupted = []

    def _close_for_requests(self) -> None:
        self._info = None
        self._ready.clear()
        if self._stats is not None:
            self._stats = at_rest(self._stats)

    @property
    def num_open(self) -> int:
        """Requests without their last event."""
        return len(self._streams)

    def submit(self, request: Request) -> AsyncIterator[Tokens | Finished]:
        stream = Stream(request)
        self.open(Submit(request), stream)
        return stream.inbox

    def open(self, message: Submit, listener: Listener) -> None:
        """Submit one request, whose events `listener` takes."""
        request_id = message.request.request_id
        assert request_id not in self._streams, "request ids are used once"
        if not self._streams and self.on_busy is not None:
            self.on_busy(True)
        self._streams[request_id] = listener
        if self._info is None:
            self._deliver(listener.failed(NO_ENGINE))
        elif (refusal := self._suspects.refusal(message.request)) is not None:
            self._deliver(listener.failed(refusal, ErrorCode.REFUSED))
        else:
            self._send(message)

    def forget(self, request_id: str) -> None:
        """No event follows: a request has ended, or has left the engine for another one."""
        del self._streams[request_id]
        if not self._streams and self.on_busy is not None:
            self.on_busy(False)

    def tell(self, message: TakePages | Resume | PeerLost) -> None:
        """What an engine of the other role has said, if the engine lives."""
        if self._info is not None:
            self._send(message)

    def abort(self, request_id: str) -> None:
        if request_id in self._streams and self._info is not None:
            self._send(Abort(request_id))

    async def swap_draft(self, path: str | None) -> DraftSwapped:
        if self._info is None:
            raise ConnectionError(NO_ENGINE)
        request_id = f"swap-{next(self._swap_ids)}"
        answer: asyncio.Future[DraftSwapped] = asyncio.get_running_loop().create_future()
        self._swaps[request_id] = answer
        self._send(SwapDraft(request_id, path))
        return await answer

    def shut_down(self) -> None:
        """Ask the engine to end; open requests end with ABORT."""
        if self._socket is not None:
            self._send(Shutdown())

    def close(self) -> None:
        self.detach()
        self._context.term()

    def _send(self, message: ClientMessage) -> None:
        """Queue a message. Messages of one turn of the event loop are sent together."""
        if not self._outbox:
            asyncio.get_running_loop().call_soon(self._flush)
        self._outbox.append(message)

    def _flush(self) -> None:
        batch, self._outbox = self._outbox, []
        if batch and self._socket is not None:
            self._socket.send(encode(share_prompts(batch)))

    def _hear(self, frame: bytes) -> None:
        """Take a batch of messages. If one is invalid, no more is taken and the engine is told to
        end: `detach` follows, so that no client waits for ever."""
        try:
            batch = decode_engine(frame)
            self.num_heard += 1
            for message in batch:
                self._take(message)
        except Exception:  # nothing awaits this call: log it here
            logger.exception("the engine sent an invalid message; it is told to end")
            assert self._socket is not None
            self._socket.stop_listening()
            self.shut_down()

    def _take(self, message: EngineMessage) -> None:
        if isinstance(message, EngineInfo):
            self._ended_stats, self._stats = self.stats_so_far, None
            self._info = message
            self._ready_at = time.monotonic()
            self._ready.set()
        elif isinstance(message, EngineFailed):
            self._interrupted = [stream.request for stream in self._streams.values()]
            self._close_for_requests()
        elif isinstance(message, EngineStats):
            self._stats = message
            self.step_sizes.observe(message)
        elif isinstance(message, DraftSwapped):
            self._answer(message)
        elif isinstance(message, Reserved | PagesSent | HandedOver):
            self._streams[message.request_id].transfer(message)
        else:
            self._deliver(message)

    def _answer(self, message: DraftSwapped) -> None:
        assert self._info is not None
        self._info = msgspec.structs.replace(self._info, draft=message.draft)
        answer = self._swaps.pop(message.request_id)
        if not answer.done():  # its client may have left
            answer.set_result(message)

    def _deliver(self, event: Tokens | Finished) -> None:
        stream = self._streams.get(event.request_id)
        assert stream is not None, f"event for unknown request {event.request_id}"
        if not stream.put(event):
            self.abort(event.request_id)
        if isinstance(event, Finished):
            self.forget(event.request_id)


def at_rest(stats: EngineStats) -> EngineStats:
    """The counts of an ended engine, in which nothing runs any more."""
    return msgspec.structs.replace(
        stats,
        num_running=0,
        num_waiting=0,
        num_deferred=0,
        kv_usage=0.0,
        last_step_tokens=0,
        draft_failed=False,
    )


class Stream:
    """The unread events of one request."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.inbox = Inbox()
        self._is_given_up = False

    def put(self, event: Tokens | Finished) -> bool:
        """Add an event. False when too many are unread: the last one is an error then, and the
        engine must be told to stop."""
        if self._is_given_up:
            return True
        self.inbox.put(event)
        if len(self.inbox) <= MAX_UNREAD or isinstance(event, Finished):
            return True
        self._is_given_up = True
        self.inbox.clear()
        self.inbox.put(self.failed(UNREAD))
        return False

    def transfer(self, event: TransferEvent) -> None:
        """Engines without roles hand nothing over."""
        raise AssertionError(f"{event} of an engine without a role")

    def failed(self, reason: str, code: ErrorCode | None = None) -> Finished:
        """The last event of a request whose engine is lost."""
        return Finished(
            request_id=self.request.request_id,
            reason=FinishReason.ERROR,
            num_prompt=len(self.request.prompt_ids),
            num_output=0,
            error=reason,
            error_code=code,
        )
