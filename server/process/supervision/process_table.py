"""Which processes run, as Linux lists them; elsewhere the list is empty."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
PARENT, GROUP, USER, SYSTEM = 1, 2, 11, 12  # fields after the name of a program: proc(5)


@dataclass(frozen=True, slots=True)
class Entry:
    """A process. `ticks` is the processor time that it has used, in ticks of the system's clock
    (mostly 10 ms)."""

    pid: int
    parent: int
    group: int
    ticks: int


def entries() -> Iterator[Entry]:
    """All processes, also ended ones that nobody has waited for. Those that cannot be looked at,
    because they have just ended or no descriptors are left, are left out."""
    try:
        names = os.listdir(PROC)
    except OSError:
        return
    for name in filter(str.isdecimal, names):
        with contextlib.suppress(OSError):
            # The name of a program may hold anything, brackets and halves of characters, too.
            fields = (PROC / name / "stat").read_bytes().rpartition(b")")[2].split()
            ticks = int(fields[USER]) + int(fields[SYSTEM])
            yield Entry(int(name), int(fields[PARENT]), int(fields[GROUP]), ticks)


def children_of(parent: int) -> list[int]:
    return [entry.pid for entry in entries() if entry.parent == parent]


def ticks_of_group(group: int) -> int:
    """Processor time of a group of processes; where none of them can be looked at, a number that is
    never the same."""
    ticks = [entry.ticks for entry in entries() if entry.group == group]
    return sum(ticks) if ticks else time.monotonic_ns()
