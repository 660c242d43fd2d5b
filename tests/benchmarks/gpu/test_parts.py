"""Parts run in their own processes: one that hangs, fails or dies does not stop the others."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from benchmarks.gpu import parts
from benchmarks.gpu.parts import Found, Part, failures, run_parts
from tests.support.servers.live_server import wait_gone
from tests.support.waiting import DEADLINE, wait_until

HANGS = "import time; time.sleep(999)"


def part(name: str, code: str, seconds: float = DEADLINE, *, alone: bool = False) -> Part:
    return Part(name, (sys.executable, "-c", code), seconds, alone)


def finds(**found: object) -> str:
    return f"print('RESULT ' + {json.dumps(found)!r}, flush=True)"


class Saved:
    """Records every save."""

    def __init__(self) -> None:
        self.contents: list[dict[str, Found]] = []

    def __call__(self, found: Mapping[str, Found]) -> None:
        self.contents.append(dict(found))


def run(*given: Part, folder: Path, seconds: float = DEADLINE, saved: Saved | None = None) -> Found:
    return run_parts(given, folder, parts.time.monotonic() + seconds, saved or Saved())


class Clock:
    """Stands for `time`, and for waiting: no part takes any time but those that hang, whose time is
    over as soon as they have printed the word `said`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, logs: Path, said: str = "") -> None:
        self._now, self._logs, self._said = 0.0, logs, said
        self._wait = subprocess.Popen.wait
        monkeypatch.setattr(parts, "time", self)
        over = self._over
        monkeypatch.setattr(subprocess.Popen, "wait", lambda *given: over(*given))

    def monotonic(self) -> float:
        return self._now

    def _over(self, process: subprocess.Popen[bytes], limit: float | None = None) -> int:
        if limit is None or "sleep(999)" not in str(process.args):
            return self._wait(process, limit)
        wait_until(lambda: any(self._said in log.read_text() for log in self._logs.iterdir()))
        self._now += limit + 1
        raise subprocess.TimeoutExpired(process.args, limit)


def test_what_fails_and_what_hangs_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Clock(monkeypatch, tmp_path, "half")
    saved = Saved()
    found = run(
        part("good", finds(x=1)),
        part("wrong", finds(failed=["a differs from b"], y=2)),
        part("raising", "raise RuntimeError('no such kernel')"),
        part("hanging", f"{finds(half=1)}; {HANGS}", 1.5, alone=True),
        part("silent", "print('nothing')", alone=True),
        part("last", finds(z=3), alone=True),
        folder=tmp_path,
        saved=saved,
    )
    assert list(found) == ["good", "wrong", "raising", "hanging", "silent", "last"]
    assert failures(found) == [
        "wrong: a differs from b",
        "raising: exit code 1",
        "hanging: ended after 2 s, its limit",
        "silent: no result was printed",
    ]
    assert (found["good"]["x"], found["wrong"]["y"], found["last"]["z"]) == (1, 2, 3)
    assert found["hanging"]["half"] == 1  # found before it was ended
    assert [len(content) for content in saved.contents] == [1, 2, 3, 4, 5, 6]
    assert saved.contents[-1] == found


def test_output_of_a_part_that_fails_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(part("raising", "raise RuntimeError('no such kernel')"), folder=tmp_path)
    out = capsys.readouterr().out
    assert "== raising: " in out
    assert "RuntimeError: no such kernel" in out
    assert "no such kernel" in (tmp_path / "raising.log").read_text()


def test_the_last_result_counts_and_one_that_was_cut_off_does_not(tmp_path: Path) -> None:
    code = f"{finds(n=1)}; {finds(n=2)}; print('RESULT {{\"n\": ', end='')"
    assert run(part("cut", code), folder=tmp_path)["cut"]["n"] == 2


def test_parts_that_measure_run_alone(tmp_path: Path) -> None:
    """Each records its begin and end; parts marked `alone` overlap no other."""
    code = "import time; a = time.time(); time.sleep(0.5); print('RESULT', f'[{a}, {time.time()}]')"
    code = code.replace("f'[{a}, {time.time()}]'", "'{\"at\": [%f, %f]}' % (a, time.time())")
    names = ("one", "two", "first", "second")
    given = [part(name, code, alone=name in ("first", "second")) for name in names]
    found = run(*given, folder=tmp_path)
    (one, two, first, second) = (found[name]["at"] for name in names)
    assert max(one[1], two[1]) < first[0] < first[1] < second[0]


def test_when_time_is_over_parts_are_not_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Clock(monkeypatch, tmp_path)
    found = run(
        part("hanging", HANGS, alone=True),
        part("late", finds(x=1), alone=True),
        folder=tmp_path,
        seconds=1.0,
    )
    assert failures(found) == [
        "hanging: ended after 1 s, its limit",
        "late: not run: the time for all parts is over",
    ]


def test_what_a_part_started_ends_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch, tmp_path, "child")
    code = (
        "import subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-c', {HANGS!r}])\n"
        "print('RESULT {\"child\": %d}' % child.pid, flush=True)\n"
        f"{HANGS}"
    )
    found = run(part("parent", code, 3.0), folder=tmp_path)
    with contextlib.suppress(ProcessLookupError):  # it is gone
        wait_gone(os.pidfd_open(found["parent"]["child"]))


def test_parts_print_results_as_they_are_read(capsys: pytest.CaptureFixture[str]) -> None:
    parts.print_result({"a": [1]})
    assert parts._last_result(capsys.readouterr().out.splitlines()) == {"a": [1]}
