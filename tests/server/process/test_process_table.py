"""The list of processes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from server.process import process_table
from server.process.process_table import PROC, children_of, entries, ticks_of_group

pytestmark = pytest.mark.skipif(not PROC.is_dir(), reason="processes are listed in /proc")
BUSY = """
import time
while time.process_time() < 0.1:
    pass
print(flush=True)
input()
"""


def test_a_child_with_its_group_and_processor_time() -> None:
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", BUSY]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, start_new_session=True) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdout.readline()
        assert child.pid in children_of(os.getpid())
        (entry,) = [entry for entry in entries() if entry.pid == child.pid]
        assert (entry.parent, entry.group) == (os.getpid(), child.pid)
        least = int(0.1 * os.sysconf("SC_CLK_TCK")) - 1
        assert ticks_of_group(child.pid) == entry.ticks >= least
        child.stdin.close()
    assert children_of(child.pid) == []


def test_without_a_list_a_group_always_seems_to_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_table, "PROC", tmp_path / "none")
    before = ticks_of_group(1)
    time.sleep(0.001)
    assert ticks_of_group(1) != before
    assert list(entries()) == []
