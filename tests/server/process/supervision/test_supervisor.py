"""The launcher and its child, as processes: started again, told to stop, dying together."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.servers.live_server import wait_gone

PROGRAM = """
import logging, os, pathlib, subprocess, sys, threading
from server.process.supervision import restarts, supervisor
logging.basicConfig(level=logging.INFO, format="%(message)s")
restarts.FIRST_PAUSE, supervisor.END_TIME = {pause}, 0.0
def work(pipe):
    launcher, asked = supervisor.LauncherPipe(pipe), threading.Semaphore(0)
    launcher.call_at_stop(asked.release)
    print(os.getpid(), flush=True)
    {work}
raise SystemExit(supervisor.supervise(work, restarts.Restarts(2)))
"""
WAITS = "asked.acquire(); return 5"
Launch = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def launch() -> Iterator[Launch]:
    """Starts a launcher whose child prints its process id and does `work`."""
    started: list[subprocess.Popen[str]] = []

    def start(work: str, *arguments: str, pause: float = 0.0) -> subprocess.Popen[str]:
        program = PROGRAM.format(work=work, pause=pause)
        process = subprocess.Popen(
            [sys.executable, "-c", program, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def next_line(process: subprocess.Popen[str]) -> int:
    """The next number that a child prints."""
    assert process.stdout is not None
    return int(process.stdout.readline())


def test_a_killed_child_is_started_again_and_signals_ask_the_living_one(launch: Launch) -> None:
    process = launch(WAITS)
    first = next_line(process)
    os.kill(first, signal.SIGKILL)
    second = next_line(process)
    assert second != first
    os.kill(second, signal.SIGTERM)  # only the launcher is asked
    os.kill(second, signal.SIGINT)
    process.send_signal(signal.SIGINT)
    _, log = process.communicate()
    assert process.returncode == 5
    assert "was killed by signal 9, and with it the engine\nstarting the HTTP" in log


@pytest.mark.parametrize(
    ("work", "num_started", "code"),
    [
        ("os.kill(os.getpid(), 9)", 3, 1),
        ("return supervisor.CRASHED", 3, 70),
        ("return 0", 1, 0),
        ("return 2", 1, 2),
        ("raise ValueError('bad setup')", 1, 1),
    ],
)
def test_only_deaths_are_followed_by_a_new_start_and_not_for_ever(
    launch: Launch, work: str, num_started: int, code: int
) -> None:
    process = launch(work)
    out, log = process.communicate()
    assert (len(out.split()), process.returncode) == (num_started, code)
    assert ("the server ends" in log) == (num_started == 3)
    assert log.count("Traceback") == ("ValueError" in work)


def test_a_child_dies_with_its_launcher(launch: Launch) -> None:
    process = launch(WAITS)
    child = os.pidfd_open(next_line(process))
    process.kill()
    wait_gone(child)


def test_a_signal_ends_the_pause_before_the_next_start(launch: Launch, tmp_path: Path) -> None:
    process = launch("os.kill(os.getpid(), 9)", pause=1e6)
    assert process.stderr is not None
    assert any("starting the HTTP process again" in line for line in process.stderr)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 0


def test_what_a_killed_child_leaves_is_killed_before_the_next_start(
    launch: Launch, tmp_path: Path
) -> None:
    process = launch(
        "if not pathlib.Path(sys.argv[1]).exists():\n"
        "        pathlib.Path(sys.argv[1]).touch()\n"
        "        print(subprocess.Popen(['sleep', '300']).pid, flush=True)\n"
        f"    {WAITS}",
        str(tmp_path / "left"),
    )
    child, orphan = next_line(process), next_line(process)
    os.kill(orphan, signal.SIGSTOP)
    os.kill(child, signal.SIGKILL)
    next_line(process)
    with contextlib.suppress(ProcessLookupError):
        wait_gone(os.pidfd_open(orphan))
