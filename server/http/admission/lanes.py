"""Threads for work that would block the event loop: JSON, templates, tokenising."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

SHORT_THREADS, LONG_THREADS = 2, 2  # more threads slow down the event loop
LONG = 64 * 1024  # bytes from which work is long

TURN = 0.002  # seconds

Result = TypeVar("Result")


class Turns:
    """Lets others use the event loop now and then while much is ready to be worked on."""

    def __init__(self) -> None:
        self._began = time.perf_counter()

    async def give(self) -> None:
        """Wait for the others if this turn has been long enough."""
        if time.perf_counter() - self._began > TURN:
            await asyncio.sleep(0)
            self._began = time.perf_counter()


class Lanes:
    """Short work never waits for long work; work of one lane is done in order."""

    def __init__(self) -> None:
        self._short = ThreadPoolExecutor(SHORT_THREADS, thread_name_prefix="short-text")
        self._long = ThreadPoolExecutor(LONG_THREADS, thread_name_prefix="long-text")

    async def run(self, size: int, work: Callable[[], Result]) -> Result:
        """The result of `work`, which is for about `size` bytes."""
        lane = self._long if size >= LONG else self._short
        return await asyncio.get_running_loop().run_in_executor(lane, work)

    def close(self) -> None:
        """Drop what has not begun."""
        for lane in (self._short, self._long):
            lane.shutdown(wait=False, cancel_futures=True)
