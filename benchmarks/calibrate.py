"""Fits the constants of `aerie plan` to measured rounds and writes configs/plan/calibration.yaml.

    python -m benchmarks.calibrate benchmarks/results/planning-h200-2026-11-27.json
    python -m benchmarks.calibrate benchmarks/results/gpu-nvidia-h200-2026-11-28.json --gpu h200

The first kind of file is described in benchmarks/planned.py, the second is what `make gpu-check`
writes. Only the constants in `FITTED` change: those that a profile of kernels or the publications
named in configs/plan/calibration.yaml give are kept, and so are those to which no row is sensitive.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.planned import Row, compare
from configs.planning import CALIBRATION, Calibration, load_calibration

FITTED = (
    "memory_share",
    "compute_share",
    "cache_share",
    "attention_compute_share",
    "attention_half_tokens",
    "attention_row_us",
    "logit_reads",
    "draft_logit_reads",
    "host_us",
    "host_row_us",
    "host_node_us",
)
LOADS = {  # names of steps in the part "8B step" of gpu-check -> trees, head, rows
    "root": ("root", None, 1),
    "chain3": ("chain3", None, 1),
    "eagle3 chain3": ("chain3", "eagle3", 1),
    "root, 8 rows": ("root", None, 8),
}
CONTEXT = 170  # tokens: a prompt of 128, and half of what is decoded while steps are timed
STEPS, STRENGTH, DELTA = 12, 0.05, 1e-4
Vector = NDArray[np.float64]


def fit(
    content: Row, start: Calibration, names: Sequence[str] = FITTED, steps: int = STEPS
) -> Calibration:
    """The constants with the least squared relative errors (Gauss-Newton in their logarithms). A
    weak pull keeps constants near `start` to which no row is sensitive."""

    def moved(by: Vector) -> Calibration:
        values = {
            n: _kept(n, getattr(start, n) * math.exp(b)) for n, b in zip(names, by, strict=True)
        }
        return start.model_copy(update=values)

    def residuals(by: Vector) -> Vector:
        errors = [math.log1p(found.error) for found in compare(content, moved(by))]
        return np.array([*errors, *(STRENGTH * by)])

    at = np.zeros(len(names))
    for _ in range(steps):
        now = residuals(at)
        slopes = np.array(
            [(residuals(at + DELTA * unit) - now) / DELTA for unit in np.eye(len(at))]
        )
        step = np.linalg.lstsq(slopes.T, -now, rcond=None)[0]
        shorter = (at + step / 2**k for k in range(6))
        better = next((to for to in shorter if np.sum(residuals(to) ** 2) < np.sum(now**2)), None)
        if better is None or np.abs(better - at).max() < DELTA:
            break
        at = better
    return moved(at)


def _kept(name: str, value: float) -> float:
    """A share cannot be above 1."""
    return min(value, 1.0) if name.endswith("_share") else value


def rows_of_gpu_check(content: Row, gpu: str) -> Row:
    """The rounds that `make gpu-check` has measured, as rows of benchmarks/planned.py.

    Raises:
        ValueError: the part "8B step" is missing.
    """
    steps = content.get("parts", {}).get("8B step", {}).get("steps")
    if not steps:
        raise ValueError('the results of gpu-check hold no part "8B step"')
    found = []
    for name, (tree, head, rows) in LOADS.items():
        common = {"tree": tree, "head": head, "batch": rows, "context": CONTEXT, "gpu": gpu}
        common |= {"model": "meta-llama/Llama-3.1-8B-Instruct", "ranks": 1, "unit": "ms/round"}
        for ahead, key in ((True, "device_ms"), (False, "step_ms")):
            if name in steps and key in steps[name]:
                found.append(common | {"run_ahead": ahead, "measured": steps[name][key]})
    return {"rows": found}


def rewritten(text: str, fitted: Calibration, names: Sequence[str] = FITTED) -> str:
    """The text of a calibration file with new values; comments stay."""
    for name in names:
        value = f"{getattr(fitted, name):.3g}"
        text = re.sub(rf"(?m)^({name}: ).*$", rf"\g<1>{value}", text)
    return text


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.calibrate")
    parser.add_argument("results", type=Path)
    parser.add_argument("--gpu", default="h200", help="of results of gpu-check")
    parser.add_argument("--output", type=Path, default=CALIBRATION)
    asked = parser.parse_args(arguments)
    content = json.loads(asked.results.read_text(encoding="utf-8"))
    content = content if "rows" in content else rows_of_gpu_check(content, asked.gpu)
    fitted = fit(content, load_calibration())
    asked.output.write_text(
        rewritten(CALIBRATION.read_text(encoding="utf-8"), fitted), encoding="utf-8"
    )
    worst = max(compare(content, fitted), key=lambda found: abs(found.error))
    print(f"written: {asked.output}; largest error {worst.error:+.1%}: {worst.row}")


if __name__ == "__main__":
    main()
