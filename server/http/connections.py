"""Bounds the connections of clients, so that open files are left for everything else."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from server.http.errors import ApiError, unavailable
from server.http.metrics import CONNECTIONS, Metrics

PROBES = 8  # connections above the limit that may still ask for health, readiness and metrics
PROBE_PATHS = frozenset({b"/health", b"/ready", b"/metrics"})
LOG_EVERY = 10.0  # seconds between lines about refused connections

logger = logging.getLogger(__name__)


class Connections:
    """The limit of one server. Used only on the event loop's thread."""

    def __init__(
        self,
        limit: int,
        retry_after: int,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`limit`: connections that are open at a time. `retry_after`: seconds, for the refused."""
        self._limit = limit
        self._retry_after = retry_after
        self._metrics = metrics
        self._clock = clock
        self._num_refused = 0  # not in the log yet
        self._logged_at: float | None = None

    def is_extra(self, num_open: int) -> bool:
        """Whether the newest of `num_open` connections is above the limit."""
        return num_open > self._limit

    def leaves_no_place(self, num_open: int) -> bool:
        """Whether the newest of `num_open` connections has not even a place for a probe."""
        return num_open > self._limit + PROBES

    def refuse(self) -> ApiError:
        """Count one refused connection; returns the 503 for its client."""
        self._metrics.reject(CONNECTIONS)
        self._num_refused += 1
        now = self._clock()
        if self._logged_at is None or now - self._logged_at >= LOG_EVERY:
            logger.warning(
                "connections refused: %d; at most %d may be open (server.max_connections, and the "
                "limit of open files)",
                self._num_refused,
                self._limit,
            )
            self._num_refused, self._logged_at = 0, now
        message = f"Too many connections: at most {self._limit} may be open; try again later"
        return unavailable(message, "too_many_connections", self._retry_after)
