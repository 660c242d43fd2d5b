"""Plans carried out by all ranks at once, and the check that they agree on what they did."""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
import torch

from engine.parallel.channel import Broadcast
from engine.parallel.plan_codec import PlanEncoder
from engine.runner.warmup import PlanExecutor
from engine.step.group import TPGroup
from engine.step.plan import StepOutcome, StepPlan


class Progress:
    """Since when rank 0 has been inside a step; read by the watchdog's thread."""

    def __init__(self, limit: float) -> None:
        """`limit`: seconds that a step may take; may be changed."""
        self.limit = limit
        self._since: float | None = None

    @contextmanager
    def step(self) -> Iterator[None]:
        """A step goes on inside this block."""
        self._since = time.monotonic()
        try:
            yield
        finally:
            self._since = None

    @property
    def overdue(self) -> bool:
        """Whether a step goes on that should have ended."""
        since = self._since
        return since is not None and time.monotonic() - since > self.limit


class GroupExecutor:
    """Rank 0's way to carry out plans on every rank."""

    def __init__(
        self, own: PlanExecutor, encoder: PlanEncoder, followers: Broadcast, progress: Progress
    ) -> None:
        self._own = own
        self._encoder = encoder
        self._followers = followers
        self._progress = progress

    def execute(self, plan: StepPlan) -> StepOutcome:
        """OSError or RuntimeError when a follower is gone: the group cannot go on."""
        with self._progress.step():
            self._followers.send(self._encoder.encode(plan))
            return self._own.execute(plan)


class DriftCheck:
    """Carries out plans on this rank and compares with the others, every so many steps, what the
    plans were and which tokens came out."""

    def __init__(self, own: PlanExecutor, group: TPGroup, check_every: int) -> None:
        """`check_every`: steps between comparisons, at least 1."""
        self._own = own
        self._group = group
        self._check_every = check_every
        self._num_steps = 0
        self._sum = 0

    def execute(self, plan: StepPlan) -> StepOutcome:
        """RuntimeError when ranks disagree."""
        outcome = self._own.execute(plan)
        emitted = [row.emitted for row in outcome.rows]
        said = msgspec.msgpack.encode((plan.rows, plan.released, plan.shape, emitted))
        self._sum = zlib.crc32(said, self._sum)
        self._num_steps += 1
        if self._num_steps % self._check_every == 0:
            self._compare()
        return outcome

    def _compare(self) -> None:
        sums = self._group.stack(torch.tensor(self._sum)).tolist()
        if len(set(sums)) > 1:
            raise RuntimeError(
                f"ranks have drifted apart within the last {self._check_every} of "
                f"{self._num_steps} steps: the checksums of plans and tokens are {sums}"
            )
