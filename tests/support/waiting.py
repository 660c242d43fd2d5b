"""The deadline of tests, and waiting for what other threads, tasks and processes do."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

DEADLINE = 150.0  # seconds; the native kernels may have to be compiled in it
PAUSE = 0.002  # seconds between looks, at least
PAUSE_PER_LOOK = 10  # times the duration of a look: others need the processor more


def wait_until(
    condition: Callable[[], object], state: Callable[[], str] = lambda: "it never happened"
) -> None:
    """Return once `condition` holds; `state` is said if it never does."""
    began = time.monotonic()
    end = began + DEADLINE
    while not condition():
        now = time.monotonic()
        assert now < end, state()
        time.sleep(max(PAUSE, PAUSE_PER_LOOK * (now - began)))
        began = time.monotonic()


async def until(condition: Callable[[], object]) -> None:
    """As `wait_until`, while other tasks of this loop run."""
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, "it never happened"
        await asyncio.sleep(PAUSE)
