"""Every launch of every Triton kernel compiles for Hopper (sm_90a) within its known resources.

After an intended change, `python -m benchmarks.sm90_resources` writes the report again.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from benchmarks.sm90_resources import REPORT, ROOT, kernel_modules
from tests.kernels import triton_env

compiles = pytest.mark.extended  # all kernels: a minute
pytestmark = pytest.mark.timeout(1800)
MORE_REGISTERS = 1.25  # times the report's number; more is a regression

Report = dict[str, Any]


def regressions(before: Report, now: Report) -> list[str]:
    """Kernels that spill, or take many more registers than before."""
    lines = []
    for name, kernel in now["kernels"].items():
        known = before["kernels"].get(name)
        if known is None:
            lines.append(f"{name}: not in the report")
        elif kernel["registers"] > MORE_REGISTERS * known["registers"]:
            lines.append(f"{name}: {kernel['registers']} registers, was {known['registers']}")
    gone = before["kernels"].keys() - now["kernels"].keys()
    return lines + [f"{name}: in the report, but no longer launched" for name in sorted(gone)]


@pytest.fixture(scope="module")
def compiled() -> Report:
    """The report of this checkout, from a process that compiles instead of interpreting."""
    if not triton_env.INSTALLED:
        pytest.skip(triton_env.MISSING)
    command = [sys.executable, "-m", "benchmarks.sm90_resources", "--print"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@compiles
def test_every_kernel_file_is_compiled(compiled: Report) -> None:
    assert {kernel["module"] for kernel in compiled["kernels"].values()} == {*kernel_modules()}


@compiles
def test_no_kernel_spills_or_misses_what_it_needs(compiled: Report) -> None:
    assert compiled["problems"] == []


@compiles
def test_no_kernel_takes_more_than_the_report_says(compiled: Report) -> None:
    known = json.loads(REPORT.read_text(encoding="utf-8"))
    if known["triton"] != compiled["triton"]:
        pytest.skip(f"the report is of Triton {known['triton']}, this is {compiled['triton']}")
    assert regressions(known, compiled) == []


def test_a_regression_is_seen() -> None:
    def report(**registers: int) -> Report:
        return {"kernels": {name: {"registers": count} for name, count in registers.items()}}

    assert regressions(report(a=40), report(a=50)) == []
    assert regressions(report(a=40), report(a=51)) == ["a: 51 registers, was 40"]
    assert len(regressions(report(a=40), report(b=40))) == 2
