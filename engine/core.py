"""The engine: one loop of apply, schedule, execute, update."""

from __future__ import annotations

from engine.messages import Abort, EngineInfo, EngineMessage, EngineStats, Finished, Submit
from engine.runner.warmup import PlanExecutor
from engine.scheduler.scheduler import Scheduler
from engine.spec.planner import FixedPlanner, Planner


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

    def add(self, message: Submit | Abort) -> None:
        """Take a message; its consequences come out of the next `step`."""
        if isinstance(message, Submit):
            self._scheduler.submit(message.request)
        else:
            self._scheduler.abort(message.request_id)

    def has_work(self) -> bool:
        """Whether `step` has anything to do: rows to run or events to hand over."""
        return self._scheduler.has_work()

    def step(self) -> list[EngineMessage]:
        """Run one step and return what clients must hear, stats last."""
        shape = self._planner.choose(self._scheduler.num_decoding)
        plan = self._scheduler.schedule(shape)
        outcome = self.executor.execute(plan)
        self._planner.observe(plan, outcome)
        events: list[EngineMessage] = [*self._scheduler.update(plan, outcome)]
        events.append(self._scheduler.stats())
        return events

    def plan_with(self, planner: Planner) -> None:
        """Choose trees in another way from the next step on."""
        self._planner = planner

    def stats(self) -> EngineStats:
        return self._scheduler.stats()

    def abort_all(self, reason: str) -> list[Finished]:
        """End every open request with ERROR and `reason`."""
        return self._scheduler.abort_all(reason)

    def audit(self) -> None:
        """Assert that the bookkeeping adds up."""
        self._scheduler.audit()
