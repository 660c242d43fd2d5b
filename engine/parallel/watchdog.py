"""Notices followers that died or make no progress, also while rank 0 itself waits for them."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable, Sequence

from engine.parallel.lockstep import Progress

POLL = 0.25  # seconds between looks at the step that goes on


class Watchdog:
    """Calls `on_loss` with the reason, once, from a thread of its own. An idle group is left alone:
    a follower that hangs is noticed in the next step."""

    def __init__(
        self,
        pids: Sequence[int],
        progress: Progress,
        on_loss: Callable[[str], None],
    ) -> None:
        """`pids`: children of this process; the first is rank 1."""
        self._ranks = {os.pidfd_open(pid): rank for rank, pid in enumerate(pids, 1)}
        self._progress = progress
        self._on_loss = on_loss
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Followers may end from now on."""
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
            ended = poller.poll(POLL * 1000)
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
