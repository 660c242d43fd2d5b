"""The engine: one loop of apply, schedule, launch, collect, update."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from engine.grammar.gate import Gate, Opened
from engine.messages import (
    DraftState,
    EngineInfo,
    EngineMessage,
    EngineStats,
    ErrorCode,
    Finished,
    PagesSent,
    PeerLost,
    RequestMessage,
    Resume,
    Submit,
    TakePages,
)
from engine.request import FinishReason
from engine.scheduler.handovers import Pages
from engine.scheduler.scheduler import Scheduler
from engine.speculation.pace import Pace
from engine.speculation.policy import DraftPolicy
from engine.step.executor import Executor, Launched
from engine.step.plan import StepOutcome, StepPlan

COMPILING_POLL = 0.01  # seconds between looks at a grammar that is being compiled, when idle


class SequenceCounts(Protocol):
    """How many finished sequences were captured, and how many were dropped."""

    @property
    def num_captured(self) -> int: ...

    @property
    def num_dropped(self) -> int: ...


class Peers(Protocol):
    """Sends pages to engines of the other role, and takes theirs; see `KVTransfer`."""

    @property
    def endpoint(self) -> bytes:
        """How others reach this engine."""
        ...

    def send(self, pages: Pages) -> None:
        """Send what a step has computed. ConnectionError if its peer cannot be reached."""
        ...

    def receive(self, peer: int, blocks: Sequence[int]) -> None:
        """Take the pages of these blocks."""
        ...

    def draft_state(self, line: int) -> DraftState | None:
        """What the draft head knows of a running row besides its pages."""
        ...


class EngineCore:
    """Messages in, events out. Not thread-safe: one thread calls `add` and `step`.

    With `run_ahead` the host launches the next step before it waits for the current one. Between
    two calls of `step`, at most one step is in flight.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        info: EngineInfo,
        policy: DraftPolicy | None = None,
        *,
        run_ahead: bool = False,
        captured: SequenceCounts | None = None,
        gate: Gate | None = None,
        peers: Peers | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._scheduler = scheduler
        self._executor = executor
        self._info = info
        self._run_ahead = run_ahead
        self._captured = captured
        self._gate = gate or Gate(None)
        self._peers = peers
        if peers is not None:
            scheduler.handovers.endpoint = peers.endpoint
        self._clock = clock
        self._pace = Pace()
        self._collected_at: float | None = None  # time of the last collect; None while idle
        self._flight: Launched | None = None
        self._landed: list[EngineMessage] = []  # events of collected steps, not yet returned
        self.draft_with(policy or DraftPolicy())

    @property
    def policy(self) -> DraftPolicy:
        """How the engine drafts."""
        return self._policy

    @property
    def info(self) -> EngineInfo:
        return msgspec.structs.replace(self._info, draft=self._policy.facts)

    def add(self, message: RequestMessage) -> None:
        """Take a message; the next `step` returns the events that it causes."""
        if isinstance(message, Submit):
            opened = self._gate.take(message)
            if opened is not None:
                self._submit(opened)
        elif isinstance(message, Resume):
            self._scheduler.resume(message)
        elif isinstance(message, TakePages):
            self._take_pages(message)
        elif isinstance(message, PeerLost):
            self._gate.forget_peer(message.peer)
            self._scheduler.handovers.forget_peer(message.peer)
        elif not self._gate.abort(message.request_id):
            self._scheduler.abort(message.request_id)

    def has_work(self) -> bool:
        """Whether `step` has anything to do: rows to run or events to return."""
        if self._gate.busy:
            return True
        return self._works()

    @property
    def awaits_peers(self) -> bool:
        """Whether requests wait for other engines."""
        return bool(self._scheduler.handovers.reserved)

    def step(self) -> list[EngineMessage]:
        """Run one step and return its events for clients, stats last."""
        for opened in self._gate.ready(0.0 if self._works() else COMPILING_POLL):
            self._submit(opened)
        launched = self._flight or self._executor.launch(self._schedule())
        following = self._schedule_ahead(launched.plan)
        self._flight = None if following is None else self._executor.launch(following)
        self._take_in(launched)
        events, self._landed = self._landed, []
        if not self.has_work():
            self._collected_at = None
        return [*events, self.stats()]

    def land(self) -> None:
        """Collect the step in flight, if there is one. The next `step` returns its events."""
        if self._flight is not None:
            launched, self._flight = self._flight, None
            self._take_in(launched)

    def draft_with(self, policy: DraftPolicy) -> None:
        """Use `policy` from the next step on. The executor must have its proposer already."""
        self.land()
        self._policy = policy
        self._planner = policy.planner
        self._measuring = policy.measuring
        self._scheduler.draft_with(policy.lookahead, policy.lookup)

    def stats(self) -> EngineStats:
        stats = self._scheduler.stats()
        if deferred := self._gate.num_waiting:
            waiting = stats.num_waiting + deferred
            stats = msgspec.structs.replace(stats, num_waiting=waiting, num_deferred=deferred)
        if self._captured is None:
            return stats
        return msgspec.structs.replace(
            stats,
            num_captured=self._captured.num_captured,
            num_capture_dropped=self._captured.num_dropped,
        )

    def abort_all(self, reason: str, code: ErrorCode | None = None) -> list[EngineMessage]:
        """End every open request with ERROR and `reason`. Events of earlier steps that were not
        returned yet come first."""
        for opened in self._gate.all():
            self._submit(opened)
        events, self._landed = self._landed, []
        return [*events, *self._scheduler.abort_all(reason, code)]

    def audit(self) -> None:
        """Assert that the scheduler's bookkeeping is consistent."""
        self._scheduler.audit()

    def _works(self) -> bool:
        """Whether there is work besides compiling grammars."""
        return self._scheduler.has_work() or self._flight is not None or bool(self._landed)

    def _submit(self, opened: Opened) -> None:
        message = opened.message
        self._scheduler.submit(
            *opened.requests,
            problem=opened.problem,
            output_ids=message.output_ids,
            reserve=message.reserve,
            handover=message.handover,
        )
        for request_id in opened.aborted:
            self._scheduler.abort(request_id)

    def _schedule(self) -> StepPlan:
        self._measure()
        return self._scheduler.schedule(self._planner.choose(self._scheduler.candidates()))

    def _schedule_ahead(self, before: StepPlan) -> StepPlan | None:
        if not self._run_ahead or self._measuring is not None:
            return None
        if self._policy.lookup is not None and not self._pace.runs_ahead():
            return None
        return self._scheduler.schedule_ahead(before, self._planner.choose)

    def _measure(self) -> None:
        """Run one measuring step, if any are left; after the last, the planner is chosen."""
        if self._measuring is None:
            return
        try:
            next(self._measuring.steps)
        except StopIteration as end:
            self._planner = self._measuring.decide(end.value)
            self._measuring = None

    def _take_in(self, launched: Launched) -> None:
        outcome = self._executor.collect(launched)
        plan, outcome = self._scheduler.without_ended(launched.plan, outcome)
        seconds = self._since_last_collect()
        if seconds is not None and launched.plan.rows:
            self._scheduler.observe_time(launched.plan, seconds)
            self._observe_pace(plan, outcome, seconds)
        self._planner.observe(plan, outcome, seconds)
        self._landed += self._scheduler.update(plan, outcome)
        if self._peers is not None:
            self._send_pages(self._peers)

    def _send_pages(self, peers: Peers) -> None:
        for pages in self._scheduler.pages_to_send():
            draft = peers.draft_state(pages.line)  # first: it completes the pages
            if pages.blocks:
                try:
                    peers.send(pages)
                except ConnectionError as error:
                    self._give_up(pages, f"the pages of this request cannot be sent: {error}")
                    continue
                sent = PagesSent(pages.request_id, pages.first_block, len(pages.blocks))
                self._landed.append(sent)
            if pages.handed is not None:
                self._landed.append(msgspec.structs.replace(pages.handed, draft=draft))

    def _give_up(self, pages: Pages, error: str) -> None:
        """End a request here whose pages cannot be sent. The other engine goes on with those that
        have come."""
        code = ErrorCode.TRANSFER
        if pages.handed is None:
            self._scheduler.abort(pages.request_id, error, code)
            return
        reason, num_output = FinishReason.ERROR, len(pages.handed.output_ids)
        finished = Finished(pages.request_id, reason, 0, num_output, error=error, error_code=code)
        self._landed.append(finished)

    def _take_pages(self, message: TakePages) -> None:
        assert self._peers is not None, "only engines with peers reserve blocks"
        first, count = message.first_block, message.num_blocks
        blocks = self._scheduler.handovers.take_pages(message.request_id, first, count)
        if blocks:
            self._peers.receive(message.peer, blocks)

    def _since_last_collect(self) -> float | None:
        """Seconds since the step before was collected, None if the engine was idle."""
        before, self._collected_at = self._collected_at, self._clock()
        return None if before is None else self._collected_at - before

    def _observe_pace(self, plan: StepPlan, outcome: StepOutcome, seconds: float) -> None:
        if plan.only_decodes:
            num_tokens = sum(len(row.emitted) for row in outcome.rows)
            self._pace.observe(num_tokens, len(plan.rows), seconds, ahead=plan.ahead)
