"""Measures the host time of the parts of a step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Laps:
    """Seconds by part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def time(self, part: str) -> Iterator[None]:
        """Add the time spent inside this block."""
        started = time.perf_counter()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - started


class NoLaps(Laps):
    """Measures nothing: with an asynchronous device, the host time of a part is meaningless."""

    @contextmanager
    def time(self, part: str) -> Iterator[None]:  # noqa: ARG002
        yield
