"""Which processes run, as Linux lists them; elsewhere the list is empty."""

from __future__ import annotations

import contextlib
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
    """All processes, also ended ones that nobody has waited for."""
    for path in PROC.glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            fields = path.read_text(encoding="utf-8").rpartition(")")[2].split()
            ticks = int(fields[USER]) + int(fields[SYSTEM])
            yield Entry(int(path.parent.name), int(fields[PARENT]), int(fields[GROUP]), ticks)


def children_of(parent: int) -> list[int]:
    return [entry.pid for entry in entries() if entry.parent == parent]


def ticks_of_group(group: int) -> int:
    """Processor time of a group of processes; where the system does not tell, a number that is
    never the same."""
    if not PROC.is_dir():
        return time.monotonic_ns()
    return sum(entry.ticks for entry in entries() if entry.group == group)
