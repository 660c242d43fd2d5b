"""Notices followers that have died or make no progress, even while rank 0 waits for them."""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable, Sequence

from engine.parallel.lockstep import Progress

POLL = 0.25  # seconds between checks of the current step


class Watchdog:
    """Calls `on_loss` once with the reason, from its own thread. In an idle group it notices only
    followers that have ended; one that hangs is noticed in the next step."""

    def __init__(
        self,
        pids: Sequence[int],
        progress: Progress,
        on_loss: Callable[[str], None],
    ) -> None:
        """`pids`: child processes of this one; the first is rank 1."""
        self._ranks = {os.pidfd_open(pid): rank for rank, pid in enumerate(pids, 1)}
        self._progress = progress
        self._on_loss = on_loss
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Stop watching: from now on followers may end."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join()
        for handle in self._ranks:
            os.close(handle)
        self._ranks = {}

    def _watch(self) -> None:
        poller = select.poll()
        for handle in self._ranks:
            poller.register(handle, select.POLLIN)
        while not self._stopping.is_set():
            began = time.monotonic()
            ended = poller.poll(POLL * 1000)
            self._progress.excuse(max(0.0, time.monotonic() - began - 2 * POLL))
            reason = self._reason([self._ranks[handle] for handle, _ in ended])
            if reason is not None and not self._stopping.is_set():
                self._on_loss(reason)
                return

    def _reason(self, ended: Sequence[int]) -> str | None:
        if ended:
            return f"rank {ended[0]} has ended"
        if self._progress.overdue:
            return f"a rank does not answer: a step has taken {self._progress.limit:g} s"
        return None
