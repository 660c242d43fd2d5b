"""What a plain step takes, from few of them, some of which were disturbed."""

from __future__ import annotations

import pytest

from engine.speculation.account import PlainSteps
from engine.speculation.costs import StepCosts, Work

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
