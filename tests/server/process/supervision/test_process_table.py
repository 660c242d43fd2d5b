"""The list of processes."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from server.process.supervision import process_table
from server.process.supervision.process_table import (
    PROC,
    Entry,
    children_of,
    entries,
    ticks_of_group,
)

pytestmark = pytest.mark.skipif(not PROC.is_dir(), reason="processes are listed in /proc")
BUSY = """
import os, signal, time
while time.process_time() < 0.1:
    pass
os.kill(os.getpid(), signal.SIGSTOP)
"""


def test_a_child_with_its_group_and_processor_time() -> None:
    command = [sys.executable, "-c", BUSY]
    with subprocess.Popen(command, start_new_session=True) as child:
        os.waitpid(child.pid, os.WUNTRACED)  # stopped, it uses no more time
        assert child.pid in children_of(os.getpid())
        (entry,) = [entry for entry in entries() if entry.pid == child.pid]
        assert (entry.parent, entry.group) == (os.getpid(), child.pid)
        least = int(0.1 * os.sysconf("SC_CLK_TCK")) - 1
        assert ticks_of_group(child.pid) == entry.ticks >= least
        child.send_signal(signal.SIGCONT)
    assert children_of(child.pid) == []


def test_names_that_are_no_text_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stat = b"7 (a) b)\xc3) S 1 3 3 0 -1 4194304 1 2 3 4 50 6 7 8"
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "stat").write_bytes(stat)
    (tmp_path / "8").mkdir()  # a process that has just ended
    (tmp_path / "self").mkdir()
    monkeypatch.setattr(process_table, "PROC", tmp_path)
    assert list(entries()) == [Entry(pid=7, parent=1, group=3, ticks=56)]
    assert ticks_of_group(3) == 56


def test_without_descriptors_a_group_seems_to_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: object) -> list[str]:
        raise OSError(errno.EMFILE, "too many open files")

    monkeypatch.setattr(process_table.os, "listdir", fails)
    assert ticks_of_group(os.getpgid(0)) != ticks_of_group(os.getpgid(0))


def test_without_a_list_a_group_always_seems_to_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_table, "PROC", tmp_path / "none")
    assert ticks_of_group(1) != ticks_of_group(1)
    assert list(entries()) == []
