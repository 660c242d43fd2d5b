"""Open load at rising rates, against a scripted server."""

from __future__ import annotations

import asyncio
import itertools

import pytest

from server.measuring.answers import Answer
from server.measuring.open_load import (
    Arrival,
    Goal,
    Plan,
    Row,
    arrivals,
    check,
    saturation,
    summary,
)

PLAN = Plan((1.0, 50.0), 2000.0, 60.0, (4, 9), (2, 5), seed=0)
GOAL = Goal(ttft=1000.0, ttit=100.0, share=0.9)
REQUEST = Arrival(0.0, "hi", 4)


def row(rate: float, good: float) -> Row:
    return Row(rate, 10, 10, good, rate * good, None, None, None, None, 0.0, ())


def test_arrivals_are_a_poisson_process_of_the_wanted_rate_and_sizes() -> None:
    found = arrivals(PLAN, 2.0)
    gaps = [after.at - before.at for before, after in itertools.pairwise(found)]
    assert len(found) == pytest.approx(4000, rel=0.05)
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    assert variance == pytest.approx(mean**2, rel=0.15)  # of an exponential distribution
    assert {len(arrival.prompt.split()) for arrival in found} == set(range(4, 10))
    assert {arrival.num_tokens for arrival in found} == set(range(2, 6))
    assert found == arrivals(PLAN, 2.0) != arrivals(PLAN, 3.0)


def test_only_requests_in_time_are_good() -> None:
    fast = Answer(0.0, (0.5, 0.6), "", 4)
    late_start, slow = Answer(0.0, (1.5, 1.6), "", 4), Answer(0.0, (0.5, 1.5), "", 4)
    lost = asyncio.CancelledError()
    found = summary(2.0, [REQUEST] * 4, [fast, late_start, slow, lost], GOAL, seconds=2.0)
    assert (found.requests, found.answered, found.good, found.goodput) == (4, 3, 0.25, 0.5)
    assert found.ttft_p50 == pytest.approx(500.0)
    assert found.ttit_p99 == pytest.approx(1000.0 / 3)
    assert found.tokens_per_second == pytest.approx(12 / 1.6)
    assert found.errors == ("not answered in time",)


def test_faults_of_the_benchmark_itself_are_raised() -> None:
    with pytest.raises(KeyError):
        summary(1.0, [REQUEST], [KeyError("choices")], GOAL, 1.0)


@pytest.mark.parametrize(
    ("shares", "rate"),
    [([1.0, 1.0, 0.95], None), ([0.5], 1.0), ([1.0, 0.95, 0.45], 2.2), ([1.0, 0.8], 1.5)],
)
def test_saturation_lies_where_the_share_of_good_requests_crosses_the_goal(
    shares: list[float], rate: float | None
) -> None:
    rows = [row(2.0**i, good) for i, good in enumerate(shares)]
    found = saturation(rows, 0.9)
    assert found == (None if rate is None else pytest.approx(rate))


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (Plan((2.0, 1.0), 1, 1, (1, 1), (1, 1), 0), "rates are (2.0, 1.0)"),
        (Plan((0.0,), 1, 1, (1, 1), (1, 1), 0), "above 0"),
        (Plan((1.0,), 1, 1, (3, 2), (1, 1), 0), "prompt_words is 3 2"),
    ],
)
def test_a_load_that_cannot_be_made_is_an_error(plan: Plan, words: str) -> None:
    with pytest.raises(ValueError) as found:
        check(plan)
    assert words in str(found.value)
