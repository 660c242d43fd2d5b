"""Chunks of prompts beside running streams follow measured step times."""

from __future__ import annotations

import pytest

from engine.kv.manager import KVManager
from engine.scheduler.limits import SchedulerLimits
from engine.scheduler.pacing import LEAST_CHUNK, PromptTime, StepTimes, pairs_of, prompt_work
from engine.scheduler.scheduler import Scheduler
from engine.step.plan import RowOutcome, RowPlan, StepOutcome, StepPlan
from tests.support.engines.in_process import ask


def row(num_tokens: int, start: int, *, samples: bool) -> RowPlan:
    tokens = (7,) * num_tokens
    return RowPlan(
        line=0, start=start, token_ids=tokens, first_block=0, new_blocks=(), samples=samples
    )


def step_of(chunk: int = 0, context: int = 0) -> StepPlan:
    """A decoding row, and a chunk of a prompt."""
    rows = [row(1, 100, samples=True)]
    if chunk:
        rows.append(row(chunk, context, samples=False))
    return StepPlan(rows=tuple(rows))


DECODE, TOKEN, PAIR = 0.010, 1e-4, 1e-8  # seconds


def seconds_of(plan: StepPlan) -> float:
    tokens, pairs = prompt_work(plan)
    return DECODE + TOKEN * tokens + PAIR * pairs


def learnt() -> StepTimes:
    times = StepTimes()
    for context in range(0, 50_000, 500):
        for plan in (step_of(), step_of(64 + context % 448, context)):
            times.observe(plan, seconds_of(plan))
    return times


def test_work_counts_prompt_tokens_and_what_they_attend_to() -> None:
    assert prompt_work(step_of()) == (0, 0.0)
    assert prompt_work(step_of(3, 10)) == (3, 11 + 12 + 13)
    assert prompt_work(StepPlan(rows=(row(1, 9, samples=False),))) == (1, 10)
    assert prompt_work(StepPlan(rows=(row(2, 0, samples=True),))) == (2, 3)


def test_costs_are_learnt_from_steps() -> None:
    times = learnt()
    for count, context in ((100, 0), (512, 1000), (20, 100_000)):
        true = TOKEN * count + PAIR * pairs_of(count, context)
        assert times.cost(count, context) == pytest.approx(true, rel=0.01)
        assert times.affordable(true, context) == pytest.approx(count, abs=2)
    assert times.affordable(0.0, 0) == 0


def test_a_step_that_took_surprisingly_long_is_not_believed_at_once() -> None:
    times = learnt()
    times.observe(step_of(512, 1000), 100.0)  # a kernel was compiled
    times.observe(step_of(), 100.0)
    assert times.cost(512, 1000) < 4 * (512 * TOKEN + PAIR * pairs_of(512, 1000))
    assert times.room(0.1) == pytest.approx(0.1 - DECODE, rel=0.05)
    for _ in range(200):  # it stays so
        times.observe(step_of(512, 1000), 100.0)
    assert times.cost(512, 1000) == pytest.approx(100.0, rel=0.05)


def test_prompts_get_what_the_goal_leaves_and_never_less_than_half_of_the_time() -> None:
    times = learnt()
    assert times.room(0.1) == pytest.approx(0.1 - DECODE)
    assert times.room(0.001) == pytest.approx(DECODE)


def test_nothing_is_limited_before_both_kinds_of_steps_were_seen() -> None:
    times = StepTimes()
    for _ in range(9):
        assert times.room(0.1) is None
        times.observe(step_of(64), 0.1)
    for _ in range(4):
        assert times.room(0.1) is None
        times.observe(step_of(), 0.01)
    assert times.room(0.1) is not None


def test_the_first_step_of_each_kind_does_not_count() -> None:
    times = StepTimes()
    for seconds in (100.0, *[0.01] * 4):
        times.observe(step_of(), seconds)
    for seconds in (100.0, *[0.05] * 4):
        times.observe(step_of(40), seconds)
    assert times.cost(40, 0) == pytest.approx(0.04)
    assert times.room(0.1) == pytest.approx(0.09)


def test_the_first_chunk_of_a_step_is_never_empty() -> None:
    time = PromptTime(learnt(), 1e-9)
    assert time.spend(LEAST_CHUNK + 9, 100_000) == LEAST_CHUNK
    assert not time.is_left
    assert time.spend(LEAST_CHUNK + 9, 0) == 0
    assert PromptTime(learnt(), 1e-9).spend(3, 0) == 3


def step_times(length: int, budget: int, goal: float | None) -> list[float]:
    """A prompt beside a stream: seconds of the steps until it has its first token."""
    limits = SchedulerLimits(2, budget, 1 << 18, token_time=goal)
    scheduler = Scheduler(limits, KVManager(20_000, 16, True), frozenset(), vocab_size=100)

    def step() -> StepPlan:
        plan = scheduler.schedule()
        rows = tuple(RowOutcome((7,)) if row.samples else RowOutcome() for row in plan.rows)
        scheduler.observe_time(plan, seconds_of(plan))
        scheduler.update(plan, StepOutcome(rows))
        return plan

    scheduler.submit(ask("stream", [5] * 40, max_tokens=100_000))
    for _ in range(5):
        step()
    scheduler.submit(ask("warm", [6] * 40, max_tokens=1))
    step()
    scheduler.submit(ask("long", [5, 6] * (length // 2), max_tokens=1))
    found = []
    while scheduler.stats().num_running + scheduler.stats().num_waiting > 1:
        found.append(seconds_of(step()))
    return found


def test_a_long_prompt_is_computed_in_full_chunks_where_these_meet_the_goal() -> None:
    steps = step_times(131_072, 512, goal=2.0)
    assert len(steps) <= 131_072 // 511 + 1
    assert len(step_times(131_072, 512, goal=None)) == len(steps)


def test_streams_keep_to_the_goal_beside_a_long_prompt() -> None:
    steps = step_times(32_768, 512, goal=0.03)
    assert max(steps[5:]) <= 0.032, "once enough steps were seen"
    assert len(steps) < 1.3 * sum(second - DECODE for second in steps) / (0.03 - DECODE)
