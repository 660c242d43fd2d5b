"""A run that ends by the clock: on one device, the target answers prompts and the head learns from
the answers, in turns.

Both need the whole device, so they alternate in short phases. Answering stops early enough that the
last answers are learnt from, too. The learning rate follows the clock, so the run ends with a small
rate whatever the speed of the device.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from configs.training import RunConfig
from drafter.train.answers.interview import Interview
from drafter.train.answers.lockstep import LockstepTarget
from drafter.train.data.batches import least_learnt
from drafter.train.data.encoding import Example
from drafter.train.history import Entry, write_whole
from drafter.train.trainer import Trainer

PHASES = 40  # of a run
LAST_ANSWERS = 0.75  # share of the time after which only learning goes on
RESERVE = 0.03  # share of the time that is kept for writing the head
MEASUREMENTS = 10


class Clock:
    """The time of a run."""

    def __init__(self, seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._started = now()
        self._seconds = seconds * (1 - RESERVE)
        self._kept = 0.0
        self.is_cut = False  # by `cut`

    def cut(self) -> None:
        """The time is over now: somebody ends the run early."""
        self.is_cut = True

    def elapsed(self) -> float:
        """Seconds since the run began."""
        return self._now() - self._started

    def keep(self, seconds: float) -> None:
        """Keep so much time for what follows the last step."""
        self._kept = max(self._kept, min(seconds, self._seconds / 2))

    def share(self) -> float:
        """Of the time until the last step, 0 to 1 and more."""
        if self.is_cut:
            return math.inf
        return self.elapsed() / (self._seconds - self._kept)


@dataclass(slots=True)
class Spent:
    """Where the time of a run went, in seconds, and what it gave."""

    starting: float = 0.0
    answering: float = 0.0
    learning: float = 0.0
    measuring: float = 0.0
    num_drawn: int = 0  # answer tokens that the target drew, unfinished answers included
    num_examples: int = 0
    num_learnt: int = 0  # answer tokens learnt from, repetitions included

    def write(self, path: Path) -> None:
        """OSError if it cannot be written."""
        write_whole(path, (json.dumps(asdict(self), indent=1) + "\n").encode())


class Pool:
    """The examples of a run so far; grows while the target answers."""

    def __init__(self, target: LockstepTarget, interview: Interview) -> None:
        self._target = target
        self._interview = interview
        self._answers = target.answers(interview.ask)
        self.examples: list[Example] = []
        self.lengths: list[int] = []  # tokens of each example
        self.num_tokens = 0  # of all examples
        self.is_complete = False  # every prompt has been answered as often as it will be

    @property
    def num_drawn(self) -> int:
        return self._target.num_tokens

    def grow(self, enough: Callable[[], bool]) -> None:
        """Let the target answer until `enough`, which is asked after every answer."""
        for answer in self._answers:
            example = self._interview.take(answer)
            if example is not None:
                self.examples.append(example)
                self.lengths.append(len(example.token_ids))
                self.num_tokens += len(example.token_ids)
            if enough():
                return
        self.is_complete = True


class TimedRun:
    """Alternates between answering and learning until the time is over."""

    def __init__(self, trainer: Trainer, pool: Pool, answering: float, clock: Clock) -> None:
        """`answering`: share of the time that the target answers, as long as it does."""
        self._trainer = trainer
        self._pool = pool
        self._answering = answering
        self._clock = clock
        self._batches = trainer.batches(self._numbered(trainer.config))
        self._measured = 0.0  # share of the time at the last measurement
        self._measured_step = -1
        self.spent = Spent(starting=clock.elapsed())

    def run(self, on_step: Callable[[Entry], None]) -> None:
        """Train; one step at least. A run that is cut saves at once, and measures no more. OSError
        if the log or a checkpoint cannot be written."""
        self._measure()
        self._learn(0.0, on_step)
        while self._clock.share() < 1:
            end = min(1.0, self._clock.share() + 1 / PHASES)
            if self._may_answer():
                self._answer(end)
            else:
                self._learn(end, on_step)
            if self._clock.share() - self._measured > 1 / MEASUREMENTS:
                self._measure()
        self._trainer.save()
        self._measure()

    def _may_answer(self) -> bool:
        spent = self.spent
        busy = spent.answering + spent.learning
        early = self._clock.share() < LAST_ANSWERS and not self._pool.is_complete
        return early and spent.answering <= self._answering * busy

    def _answer(self, end: float) -> None:
        started = self._clock.elapsed()
        self._pool.grow(lambda: self._clock.share() >= end)
        self.spent.answering += self._clock.elapsed() - started
        self.spent.num_drawn = self._pool.num_drawn
        self.spent.num_examples = len(self._pool.examples)

    def _learn(self, end: float, on_step: Callable[[Entry], None]) -> None:
        """At least one step."""
        started = self._clock.elapsed()
        while True:
            on_step(self._trainer.learn(self._batches))
            if self._trainer.step % self._trainer.config.checkpoint_every == 0:
                self._trainer.save()
            if self._clock.share() >= end:
                break
        self.spent.learning += self._clock.elapsed() - started
        self.spent.num_learnt = self._trainer.num_answer_tokens

    def _measure(self) -> None:
        """Unless no step has been made since the last time, or the run is cut."""
        if self._measured_step == self._trainer.step or self._clock.is_cut:
            return
        started = self._clock.elapsed()
        self._trainer.measure()
        seconds = self._clock.elapsed() - started
        self._clock.keep(seconds)
        self._measured, self._measured_step = self._clock.share(), self._trainer.step
        self.spent.measuring += seconds

    def _numbered(self, config: RunConfig) -> Iterator[tuple[int, list[int]]]:
        packed = self._trainer.corpus.packed
        return enumerate(least_learnt(self._pool.lengths, config.batch_tokens, config.seed, packed))
