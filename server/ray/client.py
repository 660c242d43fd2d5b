"""The engine client of a front end: streams of events from replicas of Ray Serve."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from engine.messages import (
    DraftSwapped,
    EngineInfo,
    EngineStats,
    Finished,
    Tokens,
)
from engine.request import FinishReason, Request
from server.http.engine_client import StepSizes
from server.process.channel.client import ENGINE_LOST, at_rest
from server.process.channel.totals import total
from server.ray.messages import (
    EngineStatus,
    Head,
    Route,
    decode_events,
    decode_status,
    decode_swapped,
    encode,
)
from server.routing.chain import prefix_chain

FAILURES = (RayError, RayServeException, asyncio.CancelledError)
EAGER_PERIOD = 0.1  # seconds between looks while no engine answers
LONGEST_LOOK = 5.0  # seconds that engines have to tell their status

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Call:
    """A request on its way. It has `begun` once an engine has it."""

    response: Any
    begun: bool = False
    aborted: bool = False


class RayEngineClient:
    """Implements `EngineClient` over all replicas of the engine's deployment."""

    def __init__(self, engines: DeploymentHandle[Any], period: float) -> None:
        """`period`: seconds between looks at up to 100 engines."""
        self._engines = engines
        self._streams = engines.options(stream=True)
        self._period = period
        self._calls: dict[str, _Call] = {}
        self._engine_statuses: Sequence[EngineStatus] = ()
        self._counted: dict[str, EngineStats] = {}  # by engine, also those that have ended
        self._head = Head()
        self._ready = asyncio.Event()
        self._pushing: asyncio.Task[None] | None = None
        # Ray starts engines again, and they do not tell of single steps.
        self.num_restarts = 0
        self.step_sizes = StepSizes()

    @property
    def info(self) -> EngineInfo | None:
        return self._engine_statuses[0].info if self._engine_statuses else None

    @property
    def stats(self) -> EngineStats | None:
        """Counts of all engines, also of those that have ended, and the mean use of the caches of
        those that have not."""
        found = list(self._counted.values())
        stats = total(found)
        if stats is None:
            return None
        usage = sum(each.kv_usage for each in found) / max(1, len(self._engine_statuses))
        return msgspec.structs.replace(stats, kv_usage=usage)

    async def wait_ready(self) -> None:
        """Return once an engine takes requests."""
        await self._ready.wait()

    async def watch(self) -> None:
        """Look at the engines until cancelled."""
        while True:
            await self._look()
            number = len(self._engine_statuses)
            await asyncio.sleep(self._period * max(1, number / 100) if number else EAGER_PERIOD)

    def submit(self, request: Request) -> AsyncIterator[Tokens | Finished]:
        assert request.request_id not in self._calls, "request ids are used once"
        response = self._streams.generate.remote(encode(request), encode(self._route(request)))
        call = self._calls[request.request_id] = _Call(response)
        return self._events(request, call)

    def abort(self, request_id: str) -> None:
        call = self._calls.get(request_id)
        if call is None or call.aborted:
            return
        call.aborted = True
        if call.begun:
            self._engines.abort.remote(request_id, encode(Route(request_id)))
        else:
            call.response.cancel()

    async def swap_draft(self, path: str | None) -> DraftSwapped:
        """Draft with the head in all engines, or in none: where one refuses, the others take back
        their old head."""
        before = self.info
        if before is None:
            raise ConnectionError("no engine is running")
        head = Head(time.time(), path)
        answers = await self._draft_with(head)
        if not answers:
            raise ConnectionError("no engine is running")
        errors = [answer.error for answer in answers if answer.error is not None]
        if not errors:
            self._head = head
            await self._look()
            return answers[0]
        if len(errors) < len(answers):
            old = None if before.draft is None else before.draft.path
            self._head = Head(time.time(), old)
            await self._draft_with(self._head)
        return DraftSwapped("", error=errors[0])

    async def _draft_with(self, head: Head) -> list[DraftSwapped]:
        answers = await self._ask_all("draft_with", head.version, head.path)
        lost = [answer for answer in answers if isinstance(answer, BaseException)]
        for error in lost:
            logger.warning("an engine did not take the draft head: %s", _first_line(error))
        return [decode_swapped(answer) for answer in answers if isinstance(answer, bytes)]

    async def _look(self) -> None:
        try:
            answers = await self._ask_all("status", at_most=LONGEST_LOOK)
        except TimeoutError:  # one is slow, which says nothing of the others
            logger.warning("an engine has not told its status for %.0f s", LONGEST_LOOK)
            return
        self._take([decode_status(answer) for answer in answers if isinstance(answer, bytes)])

    async def _ask_all(
        self, method: str, *arguments: object, at_most: float | None = None
    ) -> list[Any]:
        """The answer of every engine, or its exception; nothing without engines. TimeoutError if
        one has not answered after `at_most` seconds."""
        try:
            asked = self._engines.broadcast(method, *arguments)
            return list(await asked.results_async(timeout_s=at_most, return_exceptions=True))
        except (RayError, RayServeException) as error:
            logger.debug("the engines cannot be asked: %s", _first_line(error))
            return []

    def _take(self, statuses: Sequence[EngineStatus]) -> None:
        if len(statuses) != len(self._engine_statuses):
            logger.info("engines that take requests: %d", len(statuses))
        self._engine_statuses = statuses
        if statuses:
            self._ready.set()
        else:
            self._ready.clear()
        self._counted = {name: at_rest(stats) for name, stats in self._counted.items()}
        self._counted |= {each.engine_id: each.stats for each in statuses if each.stats is not None}
        self._head = max([self._head, *(each.head for each in statuses)], key=lambda h: h.version)
        behind = any(each.head.version < self._head.version for each in statuses)
        if behind and (self._pushing is None or self._pushing.done()):
            self._pushing = asyncio.create_task(self._push(self._head))

    async def _push(self, head: Head) -> None:
        """Engines that started after the choice of a head learn of it."""
        answers = await self._draft_with(head)
        errors = [answer.error for answer in answers if answer.error is not None]
        for error in errors:
            logger.warning("an engine keeps its draft head: %s", error)
        if not errors:
            logger.info("all %d engines draft with %s", len(answers), head.path)

    def _route(self, request: Request) -> Route:
        info = self.info
        chain: tuple[bytes, ...] = ()
        if info is not None:
            chain = prefix_chain(request.prompt_ids, request.cache_salt, info.block_size)
        session = f"{request.client} {request.session}" if request.session else ""
        return Route(request.request_id, chain, session)

    async def _events(self, request: Request, call: _Call) -> AsyncIterator[Tokens | Finished]:
        try:
            async for frame in call.response:
                call.begun = True
                for event in decode_events(frame):
                    yield event
                    if isinstance(event, Finished):
                        return
            yield failed(request, FinishReason.ERROR, ENGINE_LOST)
        except FAILURES as error:
            if _is_cancelled():
                raise
            if call.aborted:
                yield failed(request, FinishReason.ABORT)
                return
            logger.warning("request %s: %s", request.request_id, _first_line(error))
            yield failed(request, FinishReason.ERROR, ENGINE_LOST)
        finally:
            self._calls.pop(request.request_id, None)


def failed(request: Request, reason: FinishReason, error: str | None = None) -> Finished:
    """The last event of a request of which no engine sends it."""
    return Finished(
        request_id=request.request_id,
        reason=reason,
        num_prompt=len(request.prompt_ids),
        num_output=0,
        error=error,
    )


def _is_cancelled() -> bool:
    """Whether this task is to end, and not only the call that it waits for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _first_line(error: BaseException) -> str:
    with contextlib.suppress(IndexError):
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return type(error).__name__
