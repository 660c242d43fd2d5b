"""When a process that has died is started again: later each time, and not for ever."""

from __future__ import annotations

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds before the next start
STEADY = 20.0  # seconds of service, after which a death is the first of a new row


class Restarts:
    """Counts the deaths of one process after another. A row of deaths ends when a process has
    served for a while."""

    def __init__(self, most: int | None) -> None:
        """`most`: starts again within one row; None: no limit."""
        self._most = most
        self._in_row = 0

    def died(self, served: float) -> float | None:
        """A process has ended after serving for so many seconds. Returns the seconds to wait before
        the next one is started; None if there must be none."""
        if served >= STEADY:
            self._in_row = 0
        self._in_row += 1
        if self._most is not None and self._in_row > self._most:
            return None
        doublings = min(self._in_row - 1, 32)
        return float(min(FIRST_PAUSE * 2**doublings, LONGEST_PAUSE))
