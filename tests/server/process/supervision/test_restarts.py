"""When a dead process is started again, and when no more."""

from __future__ import annotations

import pytest

from server.process.supervision.restarts import LONGEST_PAUSE, STEADY, Restarts


@pytest.mark.parametrize(
    ("most", "served", "pauses"),
    [
        (None, [0] * 8, [0.5, 1, 2, 4, 8, 16, LONGEST_PAUSE, LONGEST_PAUSE]),
        (2, [0, 0, 0], [0.5, 1, None]),
        (2, [0, 0, STEADY, 0, 0], [0.5, 1, 0.5, 1, None]),
        (1, [STEADY, STEADY - 1], [0.5, None]),
    ],
)
def test_pauses_grow_and_starts_are_bounded_until_a_process_has_served_for_a_while(
    most: int | None, served: list[float], pauses: list[float | None]
) -> None:
    restarts = Restarts(most)
    assert [restarts.died(seconds) for seconds in served] == pauses


def test_a_long_row_without_a_limit_has_no_overflow() -> None:
    restarts = Restarts(None)
    assert {restarts.died(0) for _ in range(2000)} <= {0.5, 1, 2, 4, 8, 16, LONGEST_PAUSE}
