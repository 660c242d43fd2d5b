"""What a step is predicted to take, from steps that were timed."""

from __future__ import annotations

import random

import pytest

from engine.speculation.costs import KNOTS, Padding, Sample, StepCosts, Work, sample_of
from engine.step.plan import RowOutcome, StepOutcome, StepPlan
from engine.step.shape import ROOT, StaticShape, chain
from tests.support.engines.plans import decoding


def seconds(work: Work) -> float:
    head = work.passes * (2 + 0.5 * work.drafting)
    return (10 + 2 * work.tokens + work.rows + 0.001 * work.context + head) / 1000


def chains(num_rows: int, length: int, context: int = 0) -> Work:
    return Padding().work([length] * num_rows, chain(length), context)


SEEN = [chains(rows, length) for rows in (1, 4, 16) for length in (0, 1, 5)]


@pytest.mark.parametrize("rows", [1, 2, 4, 12, 32])
@pytest.mark.parametrize("length", [0, 1, 3, 5])
def test_a_few_steps_tell_what_others_take(rows: int, length: int) -> None:
    costs = StepCosts.fitted([Sample(work, seconds(work)) for work in SEEN])
    work = chains(rows, length)
    assert costs.of(work) == pytest.approx(seconds(work), rel=0.05)


def test_a_bend_is_learnt_from_steps() -> None:
    def bent(work: Work) -> float:
        return seconds(work) * (1.3 if work.tokens > 8 else 1.0)

    costs = StepCosts.fitted([Sample(work, seconds(work)) for work in SEEN])
    for _ in range(60):
        for work in (chains(4, 0), chains(4, 1), chains(4, 3), chains(16, 0)):
            costs.observe(Sample(work, bent(work)))
    for work in (chains(4, 0), chains(4, 1), chains(4, 3), chains(16, 0)):
        assert costs.of(work) == pytest.approx(bent(work), rel=0.06)


def test_the_context_is_learnt_from_steps() -> None:
    costs = StepCosts.fitted([Sample(work, seconds(work)) for work in SEEN])
    for at in range(300):
        work = chains(1, at % 2, context=20 * at)
        costs.observe(Sample(work, seconds(work)))
    work = chains(1, 1, context=8000)
    assert costs.of(work) == pytest.approx(seconds(work), rel=0.1)


def test_a_slower_machine_moves_what_is_not_being_done_too() -> None:
    costs = StepCosts.fitted([Sample(work, seconds(work)) for work in SEEN])
    plain, tree = chains(4, 0), chains(4, 3)
    before = costs.of(tree) / costs.of(plain)
    for _ in range(50):
        costs.observe(Sample(plain, 2 * seconds(plain)))
    assert costs.of(plain) == pytest.approx(2 * seconds(plain), rel=0.05)
    assert costs.of(tree) / costs.of(plain) == pytest.approx(before, rel=0.3)


def test_one_disturbed_step_changes_little() -> None:
    costs = StepCosts.fitted([Sample(work, seconds(work)) for work in SEEN])
    work = chains(1, 0)
    costs.observe(Sample(work, 1000.0))
    assert costs.of(work) < 1.2 * seconds(work)


def test_noise_does_not_move_what_is_not_being_done() -> None:
    costs, luck = StepCosts.fitted([Sample(work, seconds(work)) for work in SEEN]), random.Random(1)
    for at in range(2000):
        work = chains(1, at % 2)
        costs.observe(Sample(work, seconds(work) * luck.gauss(1.0, 0.1)))
    for work in (chains(1, 1), chains(1, 5), chains(16, 0), chains(16, 1)):
        assert costs.of(work) == pytest.approx(seconds(work), rel=0.15)


def test_beyond_the_last_knot_costs_go_on() -> None:
    costs = StepCosts.guessed()
    assert costs.of(Work(1, 4 * KNOTS[-1])) > costs.of(Work(1, KNOTS[-1]))


BUSH = StaticShape("bush", (-1, 0, 0, 0, 1, 1, 2))


def test_the_work_of_a_step_counts_its_padding() -> None:
    exact, padded = Padding(), Padding(lambda count: 8, whole_trees=True)
    assert exact.work([3, 0, 1], chain(5), 9) == Work(3, 7, 2, 3, 9)
    assert exact.work([0, 0], chain(5), 9) == Work(2, 2, 0, 0, 9)
    assert padded.work([3, 0, 1], chain(5), 9) == Work(8, 48, 8, 5, 9)
    assert padded.work([6], BUSH, 9) == Work(8, 56, 16, 2, 9)  # root, then two nodes


def test_looked_up_nodes_are_work_of_the_target_only() -> None:
    rows = (decoding(0, 2, (5, 6)), decoding(1, 3), decoding(2))
    outcome = StepOutcome(
        tuple(RowOutcome((1,), count) for count in (2, 3, 0)), {"draft": 0.1, "verify": 0.2}
    )
    plan = StepPlan(rows=rows, shape=chain(3))
    sample = sample_of(plan, outcome, 0.4, Padding())
    assert sample == Sample(Work(3, 8, 1, 3, 21), 0.4, 0.1)
    assert sample_of(plan, StepOutcome(outcome.rows, {"step": 0.3}), 0.4, Padding()) == Sample(
        Work(3, 8, 1, 3, 21), 0.4
    )
    assert sample_of(plan, outcome, None, Padding()) is None
    assert sample_of(StepPlan(shape=ROOT), StepOutcome(), 0.4, Padding()) is None
