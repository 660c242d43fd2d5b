"""Parts of a long check, each a process with a time limit; no part can stop another.

A part may print anything; lines `RESULT {...}` hold its results so far. The last such line counts,
even if the part hits its time limit. Its key `failed` lists what is wrong.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULT = "RESULT "
LAST_LINES = 15  # shown of a part that fails
ROOT = Path(__file__).resolve().parents[2]

Found = dict[str, Any]
Save = Callable[[Mapping[str, Found]], None]


@dataclass(frozen=True, slots=True)
class Part:
    """A command and its time limit. `alone`: nothing may run beside it, because it measures."""

    name: str
    command: tuple[str, ...]
    seconds: float
    alone: bool = False


def print_result(found: Found) -> None:
    """Print a part's results so far."""
    print(f"{RESULT}{json.dumps(found)}", flush=True)


def run_parts(parts: Sequence[Part], logs: Path, end: float, save: Save) -> dict[str, Found]:
    """Run all parts; returns their results in the order of `parts`. Those that need not be alone
    run first, together; then the others, one by one.

    Args:
        logs: folder for the output of the parts.
        end: time.monotonic() at which the last part must have ended.
        save: called after every part with all results so far.
    """
    found: dict[str, Found] = {}
    lock = threading.Lock()

    def run(part: Part) -> None:
        result = _run(part, logs / f"{part.name.replace(' ', '-')}.log", end)
        with lock:
            found[part.name] = result
            _say(part, result, logs)
            save({each.name: found[each.name] for each in parts if each.name in found})

    together = [part for part in parts if not part.alone]
    if together:
        with ThreadPoolExecutor(len(together)) as pool:
            list(pool.map(run, together))
    for part in parts:
        if part.alone:
            run(part)
    return {part.name: found[part.name] for part in parts}


def failures(found: Mapping[str, Found]) -> list[str]:
    """All failures, each with its part."""
    return [f"{name}: {line}" for name, result in found.items() for line in result["failed"]]


def _run(part: Part, log: Path, end: float) -> Found:
    limit = min(part.seconds, end - time.monotonic())
    if limit <= 0:
        return {"failed": ["not run: the time for all parts is over"], "seconds": 0.0}
    started = time.monotonic()
    problem = _wait(part.command, log, limit)
    text = log.read_text(encoding="utf-8", errors="replace")
    result = _last_result(text.splitlines())
    if result is None:
        result, problem = {}, problem or "no result was printed"
    failed = [*result.get("failed", []), *([problem] if problem else [])]
    return {**result, "failed": failed, "seconds": round(time.monotonic() - started, 1)}


def _wait(command: Sequence[str], log: Path, limit: float) -> str:
    """Run a command until it ends or hits its limit; returns the error, "" if there is none."""
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(limit)
            return f"exit code {code}" if code else ""
        except subprocess.TimeoutExpired:
            return f"ended after {limit:.0f} s, its limit"
        finally:
            _end_group(process)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Kill the part and all processes that it started."""
    with contextlib.suppress(ProcessLookupError):  # all have ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _last_result(lines: Iterable[str]) -> Found | None:
    """The last result, None without one. A line that was cut off does not count."""
    found: Found | None = None
    for line in lines:
        if line.startswith(RESULT):
            try:
                found = json.loads(line.removeprefix(RESULT))
            except ValueError:
                continue
    return found


def _say(part: Part, result: Found, logs: Path) -> None:
    print(f"== {part.name}: {result['seconds']} s, {len(result['failed'])} failed", flush=True)
    log = logs / f"{part.name.replace(' ', '-')}.log"
    if result["failed"] and log.exists():
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        shown = [line for line in lines if not line.startswith(RESULT)][-LAST_LINES:]
        print("\n".join(f"   {line}" for line in shown), flush=True)
