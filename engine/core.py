"""The engine: one loop of apply, schedule, execute, update."""

from __future__ import annotations

from typing import Any, Protocol

import msgspec

from engine.messages import Abort, EngineInfo, EngineMessage, EngineStats, ErrorCode, Submit
from engine.pipeline import Launcher, Pipeline
from engine.request import FinishReason, Sequence
from engine.runner.warmup import PlanExecutor
from engine.scheduler.scheduler import Scheduler
from engine.speculation.lookup import Lookup
from engine.speculation.planner import FixedPlanner, Planner
from engine.step.plan import StepOutcome, StepPlan


class SequenceSink(Protocol):
    """Takes note of ended sequences. Must not hold up the step."""

    @property
    def num_captured(self) -> int: ...

    @property
    def num_dropped(self) -> int: ...

    def take(self, seq: Sequence, reason: FinishReason) -> None: ...


class EngineCore:
    """Messages in, events out. Not thread-safe: one thread adds and steps."""

    def __init__(
        self,
        scheduler: Scheduler,
        executor: PlanExecutor,
        info: EngineInfo,
        planner: Planner | None = None,
    ) -> None:
        self._scheduler = scheduler
        self._planner = planner or FixedPlanner()
        self.executor = executor
        self.info = info
        self._sink: SequenceSink | None = None
        self._pipeline: Pipeline[Any] | None = None
        self._landed: list[EngineMessage] = []  # events of a step that `land` took in

    def add(self, message: Submit | Abort) -> None:
        """Take a message; its consequences come out of the next `step`."""
        if isinstance(message, Submit):
            self._scheduler.submit(message.request)
        else:
            self._scheduler.abort(message.request_id)

    def has_work(self) -> bool:
        """Whether `step` has anything to do: rows to run or events to hand over."""
        in_flight = self._pipeline is not None and self._pipeline.in_flight
        return self._scheduler.has_work() or in_flight or bool(self._landed)

    def step(self) -> list[EngineMessage]:
        """Run one step and return what clients must hear, stats last."""
        if self._pipeline is None:
            plan = self._schedule()
            self._take_in(plan, self.executor.execute(plan))
        else:
            flown = self._pipeline.step(self._schedule, self._schedule_ahead)
            self._take_in(*self._scheduler.living(*flown))
        events, self._landed = self._landed, []
        return [*events, self.stats()]

    def launch_with(self, launcher: Launcher[Any]) -> None:
        """From now on, launch the round behind one in flight before waiting for that one, where
        the plan allows it. `launcher` takes the executor's place."""
        self._pipeline = Pipeline(launcher)

    def land(self) -> None:
        """Take in what is in flight, so that nothing is; what clients must hear of it comes out of
        the next `step`."""
        landed = None if self._pipeline is None else self._pipeline.land()
        if landed is not None:
            self._take_in(*self._scheduler.living(*landed))

    def _schedule(self) -> StepPlan:
        return self._scheduler.schedule(self._planner.choose(self._scheduler.num_drafting))

    def _schedule_ahead(self, before: StepPlan) -> StepPlan | None:
        if self._planner.measures:
            return None
        return self._scheduler.schedule_ahead(before, self._planner.choose)

    def _take_in(self, plan: StepPlan, outcome: StepOutcome) -> None:
        self._planner.observe(plan, outcome)
        self._landed += self._scheduler.update(plan, outcome)

    def plan_with(self, planner: Planner) -> None:
        """Choose trees in another way from the next step on."""
        self._planner = planner

    def look_up(self, lookup: Lookup | None) -> None:
        """Draft from a sequence's own text, too, where that is better; None: no more of it."""
        self._scheduler.look_up(lookup)

    def draft_with(self, planner: Planner, lookahead: int) -> None:
        """The executor has another proposer: plan for it, from the next step on."""
        self._planner = planner
        self._scheduler.draft_with(lookahead)

    def capture_with(self, sink: SequenceSink) -> None:
        """Show every sequence that ends from now on to `sink`."""
        self._sink = sink
        self._scheduler.on_finish = sink.take

    def stats(self) -> EngineStats:
        stats = self._scheduler.stats()
        if self._sink is None:
            return stats
        return msgspec.structs.replace(
            stats,
            num_captured=self._sink.num_captured,
            num_capture_dropped=self._sink.num_dropped,
        )

    def abort_all(self, reason: str, code: ErrorCode | None = None) -> list[EngineMessage]:
        """End every open request with ERROR and `reason`; what clients had still to hear of steps
        before comes first."""
        events, self._landed = self._landed, []
        return [*events, *self._scheduler.abort_all(reason, code)]

    def audit(self) -> None:
        """Assert that the bookkeeping adds up."""
        self._scheduler.audit()
