"""What a plain step takes, from few of them, some of which were disturbed."""

from __future__ import annotations

import pytest

from engine.speculation.account import FIRST_CREDIT, MOST_CREDIT, Account, PlainSteps
from engine.speculation.costs import Sample, StepCosts, Work

WORK = Work(8, 8)


@pytest.mark.parametrize(
    ("seconds", "found"),
    [
        ((0.03, 0.01), 0.01),  # the first came after a prompt
        ((0.01, 0.012), 0.011),
        ((0.01, 0.01, 0.01, 0.09), 0.01 + 0.25 * 0.005),
        ((0.01,) * 9 + (0.005,), 0.01 - 0.2 * 0.005),
        ((0.01,) * 9 + (0.02,) * 40, 0.02),  # the machine has become slower
    ],
)
def test_a_disturbed_step_counts_little(seconds: tuple[float, ...], found: float) -> None:
    costs = StepCosts.guessed()
    plain = PlainSteps(WORK, 1.0, costs.scale)
    for each in seconds:
        plain.observe(WORK, each, costs)
    assert plain.of(WORK, costs) == pytest.approx(found, rel=1e-3)


def test_after_many_drafts_a_plain_step_counts_for_more_and_a_surprise_is_looked_into() -> None:
    """A reference of a slow phase must not make drafts look good for long after it."""
    costs = StepCosts.guessed()
    plain = PlainSteps(WORK, 1.0, costs.scale)
    for _ in range(10):
        plain.observe(WORK, 0.02, costs)
    plain.most_drafted = 64
    for _ in range(64):
        assert not plain.is_due()
        plain.pass_over()
    asked = 0
    while plain.is_due():
        plain.observe(WORK, 0.01, costs)
        asked += 1
    assert 2 <= asked <= 3
    assert plain.of(WORK, costs) == pytest.approx(0.01, rel=0.15)
    plain.num_asked, plain.is_doubtful = 1, False  # what was expected asks for no other
    assert not plain.is_due()


def test_what_drafts_win_with_one_row_is_not_there_to_be_lost_with_many() -> None:
    costs = StepCosts.guessed()
    account, one, many = Account(costs), Work(1, 1), Work(8, 8)
    account.open(one)
    account.open(many)
    tree = Work(1, 4, drafting=1, passes=3)
    for _ in range(100):
        account.settle(Sample(tree, costs.of(tree)), num_tokens=4)
    assert account.credit(1) == pytest.approx(MOST_CREDIT * costs.of(one))
    assert account.credit(8) == pytest.approx(FIRST_CREDIT * costs.of(many))
    trees = Work(8, 32, drafting=8, passes=3)
    for _ in range(3):
        account.settle(Sample(trees, costs.of(trees)), num_tokens=8)
    assert account.is_overdrawn(8)
    assert not account.is_overdrawn(1)
