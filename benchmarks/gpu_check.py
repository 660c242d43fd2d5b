"""All checks that need a GPU, in one command of at most six minutes: `make gpu-check`.

It compares kernels with their references on the device, CUDA graphs with eager steps, and the
bundled model with its head with plain decoding, and measures speeds against their bars. Each part
is a process with a time limit (benchmarks/parts.py). After every part it writes
benchmarks/results/gpu-<device>-<date>.json. Exits with 1 if a part failed, and with 0 if only bars
were missed or there is no CUDA device.

    python -m benchmarks.gpu_check                      # all parts
    python -m benchmarks.gpu_check --list
    python -m benchmarks.gpu_check --part operations    # one; the file keeps results of the others
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks import bars, machine
from benchmarks.parts import ROOT, Found, Part, failures, print_result, run_parts

ALL_SECONDS = 350.0
RESULTS, LOGS = ROOT / "benchmarks" / "results", ROOT / "benchmarks" / "out" / "gpu-check"
TEST_PROCESSES = 6
FAILED_LINES = ("FAILED", "ERROR")

# Runs every test file of the Triton kernels except the one that compiles for Hopper without a GPU.
TESTS = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout=120"]


def kernel_tests() -> Found:
    """The tests of the Triton kernels, compiled for this device instead of interpreted."""
    files = sorted((ROOT / "tests" / "kernels").glob("test_triton_*.py"), key=_size, reverse=True)
    files = [path for path in files if "sm90" not in path.name]
    with ThreadPoolExecutor(TEST_PROCESSES) as pool:
        done = dict(zip(files, pool.map(_run_tests, files), strict=True))
    failed = [line for path, run in done.items() for line in failed_tests(path.name, run)]
    ends = {path.name: (run.stdout.splitlines() or [""])[-1] for path, run in done.items()}
    return {"summaries": ends, "failed": failed}


def _size(path: Path) -> int:
    return path.stat().st_size


def _run_tests(path: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    return subprocess.run(
        [*TESTS, str(path)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def failed_tests(name: str, run: subprocess.CompletedProcess[str]) -> list[str]:
    """The failures that pytest reports for a file. It exits with 5 if no test applies here."""
    lines = [line for line in run.stdout.splitlines() if line.startswith(FAILED_LINES)]
    if run.returncode in (0, 5) or lines:
        return lines
    return [f"{name}: pytest exits with {run.returncode}: {(run.stderr or run.stdout)[-300:]}"]


def _same_tokens() -> Found:
    from benchmarks import gpu_engine

    return gpu_engine.same_tokens()


def _speeds() -> Found:
    from benchmarks import gpu_engine

    return gpu_engine.speeds()


def _large_step() -> Found:
    from benchmarks import gpu_engine

    return gpu_engine.large_step()


def _one_rank() -> Found:
    from benchmarks import gpu_group

    return gpu_group.one_rank()


def _operations_run() -> Found:
    from benchmarks import kernels

    return kernels.compiled()


def _operations() -> Found:
    from benchmarks import kernels

    return kernels.triton_operations(print_result)


INSIDE: Mapping[str, Callable[[], Found]] = {
    "kernel tests": kernel_tests,
    "same tokens": _same_tokens,
    "group of one rank": _one_rank,
    "operations run": _operations_run,  # and compile
    "operations": _operations,
    "8B step": _large_step,
    "tokens per second": _speeds,
}


def _part(name: str, seconds: float, *, alone: bool = False) -> Part:
    command = (sys.executable, "-m", "benchmarks.gpu_check", "--inside", name)
    return Part(name, command, seconds, alone)


PARTS = (
    _part("kernel tests", 150),
    _part("same tokens", 150),
    _part("group of one rank", 90),
    _part("operations run", 150),
    _part("operations", 100, alone=True),
    _part("8B step", 100, alone=True),
    _part("tokens per second", 100, alone=True),
)


def check(parts: Sequence[Part], path: Path, logs: Path, facts: Mapping[str, object]) -> int:
    """Run the parts, keep the results of other parts in `path`, print the verdicts. Returns the
    exit code."""
    logs.mkdir(parents=True, exist_ok=True)
    kept = _read(path, parts)

    def save(found: Mapping[str, Found]) -> None:
        _write(path, {"machine": facts, "parts": {**kept, **found}})

    save({})
    found = run_parts(parts, logs, time.monotonic() + ALL_SECONDS, save)
    _print_verdicts(found)
    failed = failures(found)
    for line in failed:
        print(f"FAILED {line}")
    print(f"written: {path}")
    return 1 if failed else 0


def _read(path: Path, parts: Sequence[Part]) -> dict[str, Any]:
    """The file's results of parts that do not run this time."""
    try:
        earlier: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["parts"]
    except (OSError, ValueError, KeyError):
        return {}
    again = {part.name for part in parts}
    return {name: found for name, found in earlier.items() if name not in again}


def _write(path: Path, content: Mapping[str, object]) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def _print_verdicts(found: Mapping[str, Found]) -> None:
    for result in found.values():
        for verdict in map(bars.from_json, result.get("bars", [])):
            print(verdict.line())


def main(arguments: Sequence[str] | None = None) -> int:
    asked = _parser().parse_args(arguments)
    if asked.list:
        print("\n".join(part.name for part in PARTS))
        return 0
    if not torch.cuda.is_available():
        print("skipped: no CUDA device")
        return 0
    if asked.inside is not None:
        print_result(INSIDE[asked.inside]())
        return 0
    parts = [part for part in PARTS if asked.part in (None, part.name)]
    path = RESULTS / f"gpu-{machine.device_slug()}-{datetime.now(UTC):%Y-%m-%d}.json"
    return check(parts, path, LOGS, machine.facts())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check")
    parser.add_argument("--list", action="store_true", help="list the parts")
    parser.add_argument("--part", choices=list(INSIDE), help="run only this part")
    parser.add_argument("--inside", choices=list(INSIDE), help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
