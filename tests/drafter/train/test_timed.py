"""A run by the clock: how answering and learning share the time, and that it always ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest

from drafter.train.data.encoding import Example
from drafter.train.timed import Clock, Pool, TimedRun


class FakeTime:
    """The world in which a run takes place: every answer and every step takes some time."""

    def __init__(
        self, answer: float, step: float, num_answers: int = 10**6, measure: float = 0.0
    ) -> None:
        self.now = 0.0
        self.log: list[str] = []
        self._answer, self._step, self._num_answers = answer, step, num_answers
        self._measure = measure
        self.num_tokens = self.num_answer_tokens = self.step = 0
        self.config = self.corpus = self
        self.packed = False
        self.batch_tokens, self.seed, self.checkpoint_every = 100, 0, 7

    def answers(self, _ask: Callable[[], None]) -> Iterator[int]:
        for number in range(self._num_answers):
            self.now += self._answer
            self.num_tokens += 3
            self.log.append("answer")
            yield number

    def ask(self) -> None:
        raise AssertionError("the fake target asks nothing")

    def take(self, number: int) -> Example | None:
        return Example([5, 6, 7], [False, True, True]) if number % 2 else None

    def batches(self, stream: Iterator[tuple[int, list[int]]]) -> Iterator[tuple[int, list[int]]]:
        return stream

    def learn(self, stream: Iterator[tuple[int, list[int]]]) -> None:
        number, examples = next(stream)
        assert number == self.step
        assert examples
        self.now += self._step
        self.step += 1
        self.num_answer_tokens += 2 * len(examples)
        self.log.append("step")

    def measure(self) -> None:
        self.now += self._measure
        self.log.append("measure")

    def save(self) -> None:
        self.log.append("save")


def run(world: FakeTime, seconds: float, answering: float = 0.5, started: float = 0.0) -> TimedRun:
    clock = Clock(seconds, lambda: world.now)
    world.now += started
    pool = Pool(cast(Any, world), cast(Any, world))
    pool.grow(lambda: bool(pool.lengths))
    timed = TimedRun(cast(Any, world), pool, answering, clock)
    timed.run(lambda _: None)
    return timed


@pytest.mark.parametrize("answering", [0.3, 0.6])
def test_both_have_their_share_until_answering_stops(answering: float) -> None:
    world = FakeTime(answer=0.01, step=0.07)
    spent = run(world, 100.0, answering).spent
    assert 97 <= world.now < 100
    last = len(world.log) - world.log[::-1].index("answer")
    steps_after = world.log[last:].count("step") * 0.07
    assert 20 < steps_after < 30  # the last quarter
    before = spent.learning - steps_after
    assert spent.answering / (spent.answering + before) == pytest.approx(answering, abs=0.05)
    assert spent.num_drawn == world.num_tokens
    assert spent.num_learnt == world.num_answer_tokens
    assert spent.starting + spent.answering + spent.learning == pytest.approx(world.now)


def test_it_measures_first_last_and_at_every_tenth_and_saves_the_end() -> None:
    world = FakeTime(answer=0.01, step=0.07)
    run(world, 100.0)
    assert 10 <= world.log.count("measure") <= 13
    assert world.log[-2:] == ["save", "measure"]
    assert world.log.count("save") == world.step // 7 + 1


def test_slow_measurements_do_not_make_it_late() -> None:
    world = FakeTime(answer=0.01, step=0.07, measure=8.0)
    run(world, 100.0)
    assert 88 < world.now < 100
    assert world.log.count("measure") >= 3


def test_when_all_is_answered_only_learning_goes_on() -> None:
    world = FakeTime(answer=0.01, step=0.07, num_answers=50)
    spent = run(world, 100.0).spent
    assert world.log.count("answer") == 50
    assert spent.num_examples == 25
    assert world.now >= 97


def test_a_run_whose_time_was_over_at_the_start_makes_one_step() -> None:
    world = FakeTime(answer=0.01, step=0.07)
    run(world, 1.0, started=5.0)
    assert world.step == 1
    assert world.log[-2:] == ["save", "measure"]


def test_a_run_that_is_cut_saves_at_once_and_measures_no_more() -> None:
    world = FakeTime(answer=0.01, step=0.07)
    clock = Clock(100.0, lambda: world.now)
    pool = Pool(cast(Any, world), cast(Any, world))
    pool.grow(lambda: bool(pool.lengths))
    timed = TimedRun(cast(Any, world), pool, 0.5, clock)
    timed.run(lambda _: clock.cut() if world.step == 9 else None)
    assert (world.step, world.log[-2:]) == (9, ["step", "save"])
