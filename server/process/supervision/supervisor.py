"""How the launcher keeps the HTTP process running. The launcher holds the socket that listens, so
clients wait while an HTTP process is started again."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from io import FileIO

from server.process.supervision.process_table import children_of
from server.process.supervision.restarts import Restarts

CRASHED = 70  # exit code of an HTTP process that an unexpected exception has ended
STOP = {signal.SIGTERM, signal.SIGINT}
WATCHED = STOP | {signal.SIGCHLD}
END_TIME = 5.0  # seconds for the engine of a dead HTTP process to end
POLL = 0.02  # seconds between looks at it
PR_SET_CHILD_SUBREAPER = 36  # <linux/prctl.h>

logger = logging.getLogger(__name__)


class LauncherPipe:
    """The HTTP process's end of the pipe from the launcher. A byte asks it to stop; the end of the
    pipe means that the launcher has died, and so must this process. Signals to this process itself
    do nothing: a terminal's Ctrl-C reaches both, and would count twice."""

    def __init__(self, pipe: FileIO) -> None:
        self._pipe = pipe
        self._on_stop: Callable[[], None] | None = None
        self._num_asked = 0
        self._lock = threading.Lock()
        threading.Thread(target=self._listen, daemon=True).start()

    def call_at_stop(self, ask: Callable[[], None]) -> None:
        """Call `ask` on another thread for each request to stop, also for earlier ones."""
        with self._lock:
            self._on_stop = ask
            for _ in range(self._num_asked):
                ask()

    def _listen(self) -> None:
        while self._pipe.read(1):
            with self._lock:
                self._num_asked += 1
                if self._on_stop is not None:
                    self._on_stop()
        logging.shutdown()
        signal.raise_signal(signal.SIGKILL)


def supervise(work: Callable[[FileIO], int], restarts: Restarts | None) -> int:
    """Run `work` in a child process, and again when it dies, as `restarts` says; returns its exit
    code. SIGTERM and SIGINT are passed on through the pipe that `work` gets.

    In the child this call does not come back before `work` does: it has its result and raises its
    exceptions.
    """
    handlers = {number: signal.signal(number, _ignore) for number in WATCHED}
    signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED)
    _adopt_orphans()
    while True:
        began = time.monotonic()
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(writer)
            signal.signal(signal.SIGCHLD, handlers[signal.SIGCHLD])
            signal.pthread_sigmask(signal.SIG_UNBLOCK, WATCHED)
            return work(FileIO(reader))
        os.close(reader)
        code, asked = _wait(child, writer)
        os.close(writer)
        pause = _pause(code, time.monotonic() - began, None if asked else restarts)
        if pause is None:
            return code if code >= 0 else 1
        _end_children()
        logger.info("starting the HTTP process again in %.1f s", pause)
        if _asked_within(pause):
            return 0


def _ignore(_number: int, _frame: object) -> None:
    """Unlike SIG_IGN, this is not handed on to programs that this process starts."""


def _pause(code: int, lived: float, restarts: Restarts | None) -> float | None:
    """Seconds before the next start; None when the end was in order, or must be the end."""
    if code >= 0 and code != CRASHED:
        return None
    cause = f"was killed by signal {-code}" if code < 0 else "has failed"
    pause = None if restarts is None else restarts.died(lived)
    end = "; the server ends" if pause is None else ", and with it the engine"
    logger.error("the HTTP process %s%s", cause, end)
    return pause


def _wait(child: int, writer: int) -> tuple[int, bool]:
    """Wait for the end of `child`; returns its exit code, or the negative number of the signal that
    killed it, and whether it was asked to stop."""
    asked = False
    while True:
        if signal.sigwait(WATCHED) in STOP:
            asked = True
            with contextlib.suppress(BrokenPipeError):  # it has just ended
                os.write(writer, b"s")
        for pid, status in _ended_children():
            if pid == child:
                return os.waitstatus_to_exitcode(status), asked


def _asked_within(seconds: float) -> bool:
    """Wait; True, and sooner, when a signal asks to stop."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if signal.sigpending() & STOP:
            return True
        time.sleep(POLL)
    return False


def _ended_children() -> Iterable[tuple[int, int]]:
    """Reap children that have ended, adopted ones, too: their process ids and statuses."""
    with contextlib.suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            yield found


def _adopt_orphans() -> None:
    """Become the parent of processes whose parent, the HTTP process or the engine, has died."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _end_children() -> None:
    """Wait for the engine of a dead HTTP process to end, so that its memory is free for the next
    one; kill what does not end."""
    end = time.monotonic() + END_TIME
    while (left := children_of(os.getpid())) and time.monotonic() < end:
        for _ in _ended_children():
            pass
        time.sleep(POLL)
    for pid in left:
        logger.warning("process %d of the engine does not end: it is killed", pid)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
