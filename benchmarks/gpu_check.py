"""All that only a GPU can show, in one command of some minutes: `make gpu-check`.

Kernels against their references on the device, CUDA graphs against eager rounds, the bundled model
with its head against plain decoding, and the speeds. One part's failure does not stop the others.
Writes benchmarks/results/gpu-<device>-<date>.json; exits with 1 when something failed, and with 0
on a machine without a CUDA device, which it says.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_engine, gpu_group, kernels, machine

ROOT = Path(__file__).resolve().parents[1]
KERNEL_TEST_SECONDS = 180

Part = Callable[[], dict[str, Any]]


def kernel_tests() -> dict[str, Any]:
    """The tests of the Triton kernels, compiled for this device instead of interpreted."""
    files = sorted(str(path) for path in (ROOT / "tests" / "kernels").glob("test_triton_*.py"))
    files = [path for path in files if "sm90" not in path]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout=120"]
    done = subprocess.run(
        [*command, *files],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
        timeout=KERNEL_TEST_SECONDS,
    )
    lines = done.stdout.splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {"summary": lines[-1] if lines else done.stderr[-500:], "failed": failed}


PARTS: dict[str, Part] = {
    "kernel tests": kernel_tests,
    "same tokens": gpu_engine.same_tokens,
    "tokens per second": gpu_engine.speeds,
    "group of one rank": gpu_group.one_rank,
    "8B round": gpu_engine.large_round,
    "operations": kernels.report,
}


def run_parts(parts: dict[str, Part]) -> dict[str, Any]:
    """The findings of every part, and what failed under "failures"."""
    found: dict[str, Any] = {}
    failures: list[str] = []
    for name, part in parts.items():
        print(f"== {name}", flush=True)
        started = time.perf_counter()
        try:
            result = part()
        except Exception as error:  # noqa: BLE001  (the other parts still have something to say)
            traceback.print_exc()
            result = {"failed": [f"{type(error).__name__}: {error}"[:500]]}
        result["seconds"] = round(time.perf_counter() - started, 1)
        failures += [f"{name}: {line}" for line in result.get("failed", [])]
        found[name] = result
    return {**found, "failures": failures}


def main() -> int:
    if not torch.cuda.is_available():
        print("skipped: no CUDA device")
        return 0
    found = {"machine": machine.facts(), **run_parts(PARTS)}
    path = ROOT / "benchmarks" / "results" / f"gpu-{machine.device_slug()}-{_today()}.json"
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"written: {path}")
    for line in found["failures"]:
        print(f"FAILED {line}")
    return 1 if found["failures"] else 0


def _today() -> str:
    return f"{datetime.now(UTC):%Y-%m-%d}"


if __name__ == "__main__":
    sys.exit(main())
