"""A file that says which requests the engine runs; it is read when the engine has died. Does not
import torch, so that the HTTP process can read it."""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

from engine.step.executor import Executor, Launched
from engine.step.plan import StepOutcome, StepPlan

RUNNING = "running"  # name of the file
SIZE = 16  # bytes of a request's mark


class Recorded:
    """An executor that first writes down the requests that a plan admits. The mark of a request
    stays until another one gets its line, so the file may name some that have ended."""

    def __init__(self, executor: Executor, folder: Path) -> None:
        """OSError if there can be no file in `folder`."""
        self._executor = executor
        self._file = os.open(folder / RUNNING, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)

    def launch(self, plan: StepPlan) -> Launched:
        for admission in plan.admitted:
            with contextlib.suppress(OSError):  # a full disk: nothing but suspicion is lost
                os.pwrite(self._file, mark(admission.request.request_id), admission.line * SIZE)
        return self._executor.launch(plan)

    def collect(self, launched: Launched) -> StepOutcome:
        return self._executor.collect(launched)


def mark(request_id: str) -> bytes:
    """SIZE bytes that stand for a request."""
    return hashlib.blake2b(request_id.encode(), digest_size=SIZE).digest()


def marks_in(folder: Path) -> frozenset[bytes]:
    """The marks that an engine has left; none if it has not come so far."""
    try:
        found = (folder / RUNNING).read_bytes()
    except OSError:
        return frozenset()
    return frozenset(found[start : start + SIZE] for start in range(0, len(found), SIZE))
