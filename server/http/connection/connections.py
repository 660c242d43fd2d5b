"""Bounds the connections of clients, so that open files are left for everything else."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Protocol

from server.http.errors import ApiError, unavailable
from server.http.monitoring.metrics import CONNECTIONS, Metrics

PROBES = 8  # connections above the limit, which may only ask for health, readiness and metrics
PROBE_PATHS = frozenset({b"/health", b"/ready", b"/metrics"})
LOG_EVERY = 10.0  # seconds between lines about refused connections

logger = logging.getLogger(__name__)


class Extra(Protocol):
    """A connection above the limit."""

    def give_way(self) -> None:
        """Answer 503, if there is no answer yet, and close."""
        ...


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
        self._extras: dict[Extra, None] = {}  # the oldest first

    def is_extra(self, num_open: int) -> bool:
        """Whether the newest of `num_open` connections is above the limit."""
        return num_open > self._limit

    def enter(self, extra: Extra) -> None:
        """A new connection above the limit: if there is no place for it, the oldest gives way,
        which most likely asks for nothing."""
        if len(self._extras) == PROBES:
            oldest = next(iter(self._extras))
            self.leave(oldest)
            oldest.give_way()
        self._extras[extra] = None

    def leave(self, extra: Extra) -> None:
        """A connection closes. May be repeated, and be about one within the limit."""
        self._extras.pop(extra, None)

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
