"""Parts run in their own processes: one that hangs, fails or dies does not stop the others."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from benchmarks import parts
from benchmarks.parts import Found, Part, failures, run_parts

SOON = 20.0


def part(name: str, code: str, seconds: float = SOON, *, alone: bool = False) -> Part:
    return Part(name, (sys.executable, "-c", code), seconds, alone)


def finds(**found: object) -> str:
    return f"print('RESULT ' + {json.dumps(found)!r}, flush=True)"


class Saved:
    """Records every save."""

    def __init__(self) -> None:
        self.contents: list[dict[str, Found]] = []

    def __call__(self, found: Mapping[str, Found]) -> None:
        self.contents.append(dict(found))


def run(*given: Part, folder: Path, seconds: float = SOON, saved: Saved | None = None) -> Found:
    return run_parts(given, folder, time.monotonic() + seconds, saved or Saved())


def test_what_fails_and_what_hangs_stops_no_other(tmp_path: Path) -> None:
    saved = Saved()
    found = run(
        part("good", finds(x=1)),
        part("wrong", finds(failed=["a differs from b"], y=2)),
        part("raising", "raise RuntimeError('no such kernel')"),
        part("hanging", f"{finds(half=1)}; import time; time.sleep(99)", 1.5, alone=True),
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


def test_when_time_is_over_parts_are_not_started(tmp_path: Path) -> None:
    found = run(
        part("hanging", "import time; time.sleep(99)", alone=True),
        part("late", finds(x=1), alone=True),
        folder=tmp_path,
        seconds=1.0,
    )
    assert failures(found) == [
        "hanging: ended after 1 s, its limit",
        "late: not run: the time for all parts is over",
    ]


def test_what_a_part_started_ends_with_it(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)'])\n"
        "print('RESULT {\"child\": %d}' % child.pid, flush=True)\n"
        "time.sleep(99)"
    )
    found = run(part("parent", code, 3.0), folder=tmp_path)
    assert is_gone(found["parent"]["child"])


def is_gone(pid: int) -> bool:
    """Killed processes whose parent has ended may stay as zombies for a while."""
    end = time.monotonic() + SOON
    while time.monotonic() < end:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False


def test_parts_print_results_as_they_are_read(capsys: pytest.CaptureFixture[str]) -> None:
    parts.print_result({"a": [1]})
    assert parts._last_result(capsys.readouterr().out.splitlines()) == {"a": [1]}
