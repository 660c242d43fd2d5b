"""Every operation on a CUDA device against its floor: the bytes that it must move, at the speed at
which the same run copies memory.

    python -m benchmarks.kernels       # prints a table, writes benchmarks/results/kernels-*.json
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.kernel_cases import FLOOR, Case, all_cases
from kernels.registry import build_ops

RESULTS = Path(__file__).resolve().parent / "results"
COPY_BYTES = 2**30
REPEATS = 30
FLUSH_BYTES = 2**28  # written between two runs: nothing stays in the second-level cache


@dataclass(frozen=True, slots=True)
class Measured:
    """One operation at one shape."""

    name: str
    microseconds: float
    floor_microseconds: float  # of its bytes; 0: none is known
    share_of_floor: float  # floor / time: 1 is as fast as memory
    bar: str  # what is asked for, and what came of it; "" without one
    kept: bool | None  # whether all bars are kept


def seconds_of(run: Callable[[], object], repeats: int = REPEATS) -> float:
    """Median of runs that find nothing in the cache."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(float(start.elapsed_time(end)) / 1000)
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a large copy."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / seconds_of(lambda: target.copy_(source))


def measure(cases: Iterable[Case], bandwidth: float) -> Iterator[Measured]:
    """In order; a case that fails is reported with a time of -1 and goes on with the next."""
    taken: dict[str, float] = {}  # seconds by name
    for case in cases:
        try:
            seconds = seconds_of(case.make())
        except Exception as error:  # noqa: BLE001  (one kernel's failure must not hide the others)
            kept = None if case.is_peer else False
            yield Measured(case.name, -1.0, 0.0, 0.0, f"failed: {error}"[:300], kept)
            continue
        taken[case.name] = seconds
        floor = case.num_bytes / bandwidth
        bar, kept = _judged(case, taken | {FLOOR: floor})
        yield Measured(case.name, seconds * 1e6, floor * 1e6, floor / seconds, bar, kept)


def _judged(case: Case, taken: Mapping[str, float]) -> tuple[str, bool | None]:
    """What is asked for, with what came of it, and whether all of that is kept; what has no time to
    compare with decides nothing."""
    texts: list[str] = []
    verdicts: list[bool] = []
    for bar in case.bars:
        asked = f"at most {bar.times:.2f} x {bar.of}"
        if bar.of in taken:
            ratio = taken[case.name] / taken[bar.of]
            verdicts.append(ratio <= bar.times)
            texts.append(f"{asked}: {ratio:.2f}")
        else:
            texts.append(f"{asked}: no time of it")
    return "; ".join(texts), all(verdicts) if verdicts else None


def table(rows: Iterable[Measured]) -> str:
    lines = ["| operation | us | floor us | share | bar | kept |", "| --- | ---: | ---: | ---: |"]
    lines[1] += " --- | --- |"
    for row in rows:
        times = f"{row.microseconds:.1f} | {row.floor_microseconds:.1f}"
        kept = "" if row.kept is None else "yes" if row.kept else "NO"
        lines.append(f"| {row.name} | {times} | {row.share_of_floor:.2f} | {row.bar} | {kept} |")
    return "\n".join(lines)


def report() -> dict[str, Any]:
    """Bandwidth and all operations with the Triton kernels."""
    device = torch.device("cuda")
    ops = build_ops("triton", device, torch.bfloat16, 1, Path("unused"))
    bandwidth = copy_bandwidth()
    rows = list(measure(all_cases(ops, device), bandwidth))
    print(f"copy: {bandwidth / 1e12:.2f} TB/s\n{table(rows)}")
    return {
        "copy_bytes_per_second": bandwidth,
        "operations": [asdict(row) for row in rows],
        "failed": [
            f"{row.name} {row.bar}" for row in rows if row.microseconds < 0 and row.kept is False
        ],
        "missed": [f"{row.name}: {row.bar}" for row in rows if row.kept is False],
    }


def main() -> int:
    if not torch.cuda.is_available():
        print("skipped: no CUDA device")
        return 0
    found = {"machine": machine.facts(), **report()}
    name = f"kernels-{machine.device_slug()}-{datetime.now(UTC):%Y-%m-%d}.json"
    (RESULTS / name).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 1 if found["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
