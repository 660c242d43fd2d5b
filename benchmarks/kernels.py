"""Compares every operation on a CUDA device with its floor: the time to move its bytes at the
speed of a memory copy in the same run.

    python -m benchmarks.kernels       # prints a table, writes benchmarks/results/kernels-*.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases.kernel_shapes import FLOOR, Case, all_cases
from benchmarks.measuring import bars, machine
from benchmarks.measuring.bars import Verdict
from benchmarks.measuring.device_timing import Timer, eager_seconds, graph_seconds
from configs.host import host_config
from kernels.ops import Ops
from server.assembly.operations import configured_ops

RESULTS = Path(__file__).resolve().parent / "results"
COPY_BYTES = 2**30

Found = dict[str, Any]
Tell = Callable[[Found], None]


def _nobody(_found: Found) -> None:
    pass


@dataclass(frozen=True, slots=True)
class Measured:
    """One operation at one shape."""

    name: str
    microseconds: float | None  # None: it failed
    floor_microseconds: float  # 0: no floor is known
    verdicts: tuple[Verdict, ...] = ()
    error: str = ""
    is_peer: bool = False

    @property
    def share_of_floor(self) -> float | None:
        """Floor / time: 1 is as fast as memory."""
        return None if self.microseconds is None else self.floor_microseconds / self.microseconds


def copy_bandwidth(timer: Timer = eager_seconds) -> float:
    """Bytes per second, read plus written, of a large copy. Launched without a graph, because in a
    graph the same copy was slower on an H200 (2.8 instead of 4.2 TB/s)."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / timer(lambda: target.copy_(source))


def measure(cases: Iterable[Case], bandwidth: float, timer: Timer) -> Iterator[Measured]:
    """Measure cases in order; a case that fails is reported and skipped."""
    taken: dict[str, float] = {}  # seconds by name
    for case in cases:
        floor = case.num_bytes / bandwidth
        seconds, error = _attempt(case, timer)
        if seconds is not None:
            taken[case.name] = seconds
        verdicts = tuple(_verdicts(case, taken | {FLOOR: floor}))
        micros = None if seconds is None else seconds * 1e6
        yield Measured(case.name, micros, floor * 1e6, verdicts, error, case.is_peer)


def _attempt(case: Case, timer: Timer) -> tuple[float | None, str]:
    """Seconds, or the error."""
    try:
        return timer(case.make()), ""
    except Exception as error:  # noqa: BLE001  (one kernel's failure must not hide the others)
        return None, f"{type(error).__name__}: {error}"[:300]


def _verdicts(case: Case, taken: Mapping[str, float]) -> Iterator[Verdict]:
    for bar in case.bars:
        both = case.name in taken and bar.of in taken
        ratio = taken[case.name] / taken[bar.of] if both else None
        yield Verdict(f"{case.name}, against {bar.of}", bar.times, ratio)


def table(rows: Iterable[Measured]) -> str:
    """One line per operation; its bars are listed by `python -m benchmarks.gpu_check`."""
    lines = ["| operation | us | floor us | share | bars |", "| --- | ---: | ---: | ---: | --- |"]
    for row in rows:
        if row.microseconds is None:
            lines.append(f"| {row.name} | failed | | | {row.error.splitlines()[0]} |")
            continue
        share = f"{row.share_of_floor:.2f}" if row.floor_microseconds else ""
        times = f"{row.microseconds:.1f} | {row.floor_microseconds:.1f} | {share}"
        lines.append(f"| {row.name} | {times} | {_words(row.verdicts)} |")
    return "\n".join(lines)


def _words(verdicts: Iterable[Verdict]) -> str:
    kept = [verdict.kept for verdict in verdicts]
    words = {True: "kept", False: "MISSED", None: "no value"}
    return ", ".join(
        f"{kept.count(value)} {word}" for value, word in words.items() if value in kept
    )


def report(
    cases: Iterable[Case], bandwidth: float, timer: Timer = graph_seconds, tell: Tell = _nobody
) -> Found:
    """Measure all cases. `tell` is called with the results so far after every case."""
    rows: list[Measured] = []
    for row in measure(cases, bandwidth, timer):
        rows.append(row)
        tell(found_in(rows, bandwidth))
    print(f"copy: {bandwidth / 1e12:.2f} TB/s\n{table(rows)}")
    return found_in(rows, bandwidth)


def found_in(rows: Sequence[Measured], bandwidth: float) -> Found:
    """As JSON. `failed` lists our operations that raise; peers may fail."""
    operations = [asdict(row) | {"share_of_floor": row.share_of_floor} for row in rows]
    for operation in operations:
        del operation["verdicts"]  # they are the bars
    return {
        "copy_bytes_per_second": bandwidth,
        "operations": operations,
        "bars": bars.as_json(verdict for row in rows for verdict in row.verdicts),
        "failed": [f"{row.name}: {row.error}" for row in rows if row.error and not row.is_peer],
    }


def triton_operations(tell: Tell = _nobody) -> Found:
    """Measure all operations with the Triton kernels on this device."""
    ops, device = _triton()
    return report(all_cases(ops, device), copy_bandwidth(), tell=tell)


def compiled() -> Found:
    """Runs every operation once, so that the measuring part finds compiled kernels in the caches on
    disk."""
    ops, device = _triton()
    rows = list(measure(all_cases(ops, device), 1.0, once))
    failed = [f"{row.name}: {row.error}" for row in rows if row.error and not row.is_peer]
    return {"operations": len(rows), "failed": failed}


def once(run: Callable[[], object]) -> float:
    """A timer that runs once without measuring."""
    torch.compiler.reset()
    run()
    torch.cuda.synchronize()
    return 1.0


def triton_ops(device: torch.device, *settings: str) -> Ops:
    """Triton's operations in bfloat16, as a server with these settings has them."""
    config = host_config(None, ["kernels.backend=triton", *settings])
    return configured_ops(config, device, torch.bfloat16, 1)


def _triton() -> tuple[Ops, torch.device]:
    device = torch.device("cuda")
    return triton_ops(device), device


def main(results: Path = RESULTS) -> int:
    if not torch.cuda.is_available():
        print("skipped: no CUDA device")
        return 0
    found = {"machine": machine.facts(), **triton_operations()}
    name = f"kernels-{machine.device_slug()}-{datetime.now(UTC):%Y-%m-%d}.json"
    (results / name).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for verdict in map(bars.from_json, found["bars"]):
        print(verdict.line())
    return 1 if found["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
