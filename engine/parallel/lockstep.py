"""Runs plans on all ranks in step, and checks that the ranks agree on the results."""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
import torch

from engine.parallel.orders import Orders
from engine.step.executor import Executor, Launched
from engine.step.group import TPGroup
from engine.step.plan import StepOutcome, StepPlan


class Progress:
    """How long rank 0 has been inside a step; read by the watchdog's thread."""

    def __init__(self, limit: float) -> None:
        """`limit`: seconds that a step may take; it may be changed later."""
        self.limit = limit
        self._since: tuple[float, float] | None = None  # the clock, and `_excused` then
        self._excused = 0.0

    @contextmanager
    def step(self) -> Iterator[None]:
        """Wrap this around launching a step or waiting for it."""
        self._since = time.monotonic(), self._excused
        try:
            yield
        finally:
            self._since = None

    @property
    def overdue(self) -> bool:
        """Whether the current step has exceeded the limit."""
        since = self._since
        if since is None:
            return False
        began, excused_before = since
        return time.monotonic() - began - (self._excused - excused_before) > self.limit

    def excuse(self, seconds: float) -> None:
        """For so long the whole process stood still (a machine that was paused, SIGSTOP): that is
        not the step's time. Only the watchdog's thread calls it."""
        self._excused += seconds


class GroupExecutor:
    """Runs plans on every rank, from rank 0: followers get the plan and nothing else."""

    def __init__(
        self, own: Executor, followers: Orders, progress: Progress, *, scratch: bool = False
    ) -> None:
        """`scratch`: plans are for the runner that measures a head."""
        self._own = own
        self._followers = followers
        self._progress = progress
        self._scratch = scratch

    def launch(self, plan: StepPlan) -> Launched:
        """OSError or RuntimeError if a follower has died: the group cannot continue."""
        with self._progress.step():
            self._followers.run_step(plan, scratch=self._scratch)
            return self._own.launch(plan)

    def collect(self, launched: Launched) -> StepOutcome:
        """Raises as `launch`."""
        with self._progress.step():
            return self._own.collect(launched)


class Following:
    """Runs plans on a follower: launches each as it arrives and, like rank 0, keeps at most one
    step in flight besides the newest."""

    def __init__(self, own: Executor) -> None:
        self._own = own
        self._flight: Launched | None = None

    def run(self, plan: StepPlan) -> None:
        """Launch a plan. Collect the step before it first, or afterwards if the plan is `ahead`."""
        if not plan.ahead:
            self.land()
        launched = self._own.launch(plan)
        self.land()
        self._flight = launched

    def land(self) -> None:
        """Collect the step in flight, if there is one."""
        if self._flight is not None:
            flight, self._flight = self._flight, None
            self._own.collect(flight)


class DriftCheck:
    """Runs plans on this rank; every `check_every` steps it compares plans and emitted tokens with
    the other ranks.

    Ranks compare before they launch a step, when all have collected the same steps. After a
    collect they may differ: rank 0 may have collected the newest step while a follower still waits
    for its next order.
    """

    def __init__(self, own: Executor, group: TPGroup, check_every: int) -> None:
        """`check_every`: steps between comparisons, at least 1."""
        self._own = own
        self._group = group
        self._check_every = check_every
        self._num_steps = 0
        self._num_compared = 0
        self._sum = 0

    def launch(self, plan: StepPlan) -> Launched:
        """RuntimeError when ranks disagree."""
        if self._num_steps - self._num_compared >= self._check_every:
            self._compare()
        return self._own.launch(plan)

    def collect(self, launched: Launched) -> StepOutcome:
        outcome = self._own.collect(launched)
        plan = launched.plan
        emitted = [row.emitted for row in outcome.rows]
        said = msgspec.msgpack.encode((plan.rows, plan.released, plan.shape, emitted))
        self._sum = zlib.crc32(said, self._sum)
        self._num_steps += 1
        return outcome

    def _compare(self) -> None:
        since = self._num_steps - self._num_compared
        self._num_compared = self._num_steps
        sums = self._group.stack(torch.tensor(self._sum)).tolist()
        if len(set(sums)) > 1:
            raise RuntimeError(
                f"ranks have drifted apart within the last {since} of {self._num_steps} steps: "
                f"the checksums of plans and tokens are {sums}"
            )
