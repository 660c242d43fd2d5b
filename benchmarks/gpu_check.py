"""All checks that need a GPU, in one command of at most six minutes: `make gpu-check`.

It compares kernels with their references on the device, CUDA graphs with eager steps, and the
bundled model with its head with plain decoding, and measures speeds against their bars. Each part
is a process with a time limit (benchmarks/gpu/parts.py). After every part it writes
benchmarks/results/gpu-<device>-<date>.json. Exits with 1 if a part failed, and with 0 if only bars
were missed or there is no CUDA device.

    python -m benchmarks.gpu_check                      # all parts
    python -m benchmarks.gpu_check --list
    python -m benchmarks.gpu_check --part operations    # one; the file keeps results of the others
    python -m benchmarks.gpu_check --seconds 120        # what does not fit is cut off or left out
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.parts import ROOT, Found, Part, failures, print_result, run_parts
from benchmarks.measuring import bars, machine

ALL_SECONDS = 350.0
RESULTS, LOGS = ROOT / "benchmarks" / "results", ROOT / "benchmarks" / "out" / "gpu-check"
TEST_PROCESSES = 12
FAILED_LINES = ("FAILED", "ERROR")

# Runs every test file of the Triton kernels except the one that compiles for Hopper without a GPU.
TESTS = [
    sys.executable,
    "-m",
    "pytest",
    "-q",
    "-p",
    "no:cacheprovider",
    "--timeout=120",
    "--tb=short",
]


def kernel_tests() -> Found:
    """The tests of the Triton kernels, compiled for this device instead of interpreted."""
    files = sorted((ROOT / "tests" / "kernels").rglob("test_triton_*.py"), key=_size, reverse=True)
    files = [path for path in files if "sm90" not in path.name]
    found: Found = {"summaries": {}, "failed": [], "not_ended": [path.name for path in files]}
    with ThreadPoolExecutor(TEST_PROCESSES) as pool:
        running = {pool.submit(_run_tests, path): path.name for path in files}
        for ended in as_completed(running):
            name, run = running[ended], ended.result()
            found["summaries"][name] = (run.stdout.splitlines() or [""])[-1]
            found["not_ended"].remove(name)
            failed = failed_tests(name, run)
            if failed:
                print(run.stdout[-6000:])
            found["failed"] += failed
            print_result(found)
    return found


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
    from benchmarks.gpu import engine as gpu_engine

    return gpu_engine.same_tokens()


def _tiny(name: str) -> Callable[[], Found]:
    def run() -> Found:
        from benchmarks.gpu import tiny as gpu_tiny

        found: Found = getattr(gpu_tiny, name)()
        return found

    return run


def _rounds() -> Found:
    from benchmarks.gpu import rounds as gpu_rounds

    return gpu_rounds.rounds()


def _speeds() -> Found:
    from benchmarks.gpu import engine as gpu_engine

    return gpu_engine.speeds()


def _large_step() -> Found:
    from benchmarks.gpu import engine as gpu_engine

    return gpu_engine.large_step()


def _one_rank() -> Found:
    from benchmarks.gpu import group as gpu_group

    return gpu_group.one_rank()


def _operations_run() -> Found:
    from benchmarks import kernels

    return kernels.compiled()


def _operations() -> Found:
    from benchmarks import kernels

    return kernels.triton_operations(print_result)


INSIDE: Mapping[str, Callable[[], Found]] = {
    "kernel tests": kernel_tests,
    "tiny models in float32": _tiny("same_tokens"),
    "tiny models in bfloat16": _tiny("graphs_equal_eager"),
    "tiny Llama 4": _tiny("llama4"),
    "tiny models with grammars": _tiny("grammars"),
    "same tokens": _same_tokens,
    "group of one rank": _one_rank,
    "operations run": _operations_run,  # and compile
    "operations": _operations,
    "8B rounds": _rounds,
    "8B step": _large_step,
    "auto on a random model": _tiny("automatic"),
    "tokens per second": _speeds,
}


def _part(name: str, seconds: float, *, alone: bool = False) -> Part:
    command = (sys.executable, "-m", "benchmarks.gpu_check", "--inside", name)
    return Part(name, command, seconds, alone)


PARTS = (
    _part("kernel tests", 150),
    _part("tiny models in float32", 150),
    _part("tiny models in bfloat16", 150),
    _part("tiny Llama 4", 150),
    _part("tiny models with grammars", 150),
    _part("same tokens", 150),
    _part("group of one rank", 90),
    _part("operations run", 150),
    _part("operations", 100, alone=True),
    _part("8B rounds", 100, alone=True),
    _part("8B step", 100, alone=True),
    _part("auto on a random model", 60, alone=True),
    _part("tokens per second", 100, alone=True),
)


def check(
    parts: Sequence[Part],
    path: Path,
    logs: Path,
    facts: Mapping[str, object],
    seconds: float = ALL_SECONDS,
) -> int:
    """Run the parts, keep the results of other parts in `path`, print the verdicts. Returns the
    exit code."""
    logs.mkdir(parents=True, exist_ok=True)
    kept = _read(path, parts)

    def save(found: Mapping[str, Found]) -> None:
        _write(path, {"machine": facts, "parts": {**kept, **found}})

    save({})
    found = run_parts(parts, logs, time.monotonic() + seconds, save)
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
    parts = [part for part in PARTS if asked.part is None or part.name in asked.part]
    if asked.limit is not None:
        parts = [replace(part, seconds=asked.limit) for part in parts]
    path = RESULTS / f"gpu-{machine.device_slug()}-{datetime.now(UTC):%Y-%m-%d}.json"
    return check(parts, path, LOGS, machine.facts(), asked.seconds)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check")
    parser.add_argument("--list", action="store_true", help="list the parts")
    parser.add_argument("--part", choices=list(INSIDE), action="append", help="run only these")
    parser.add_argument("--seconds", type=float, default=ALL_SECONDS, help="for all parts")
    parser.add_argument("--limit", type=float, help="seconds for each part")
    parser.add_argument("--inside", choices=list(INSIDE), help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
