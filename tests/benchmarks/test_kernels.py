"""Times of operations, with a fake device clock."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import kernels
from benchmarks.cases.kernel_shapes import FLOOR, Bar, Case, all_cases
from benchmarks.kernels import found_in, measure, report, table, triton_ops
from benchmarks.measuring import device_timing, machine
from benchmarks.measuring.device_timing import RUNS, Run, durations_ms, pauses_ms, seconds_per_run
from kernels.ops import Ops
from kernels.registry import DRAFTING_OPERATIONS
from tests.kernels import triton_env

META = torch.device("meta")


def two_microseconds(_run: Run) -> float:
    return 2e-6


def quick() -> Run:
    return lambda: None


def broken() -> Run:
    raise ValueError("head_dim 7")


CASES = [
    Case("fast", 1000, quick, bars=(Bar(2.5),)),
    Case("slow", 1000, quick, bars=(Bar(1.5),)),
    Case("free", 0, quick),
    Case("broken", 1000, broken, bars=(Bar(1.5),)),
    Case("peer", 1000, broken, is_peer=True),
    Case("as fast", 1000, quick, bars=(Bar(3.0), Bar(1.0, "fast"))),
    Case("not faster", 1000, quick, bars=(Bar(3.0), Bar(0.9, "fast"))),
    Case("unknown", 1000, quick, bars=(Bar(1.0, "peer"),)),
]


def test_an_operation_is_compared_with_the_time_its_bytes_take() -> None:
    rows = list(measure(CASES, 1e9, two_microseconds))
    assert [[verdict.kept for verdict in row.verdicts] for row in rows] == [
        [True],
        [False],
        [],
        [None],
        [],
        [True, True],
        [True, False],
        [None],
    ]
    assert rows[0].share_of_floor == pytest.approx(0.5)
    assert rows[0].verdicts[0].value == pytest.approx(2.0)
    assert rows[6].verdicts[1].name == "not faster, against fast"
    assert [row.error for row in rows if row.error] == ["ValueError: head_dim 7"] * 2


def test_the_table_has_a_line_for_every_case() -> None:
    lines = table(measure(CASES, 1e9, two_microseconds)).splitlines()
    assert len(lines) == 2 + len(CASES)
    assert lines[2] == "| fast | 2.0 | 1.0 | 0.50 | 1 kept |"
    assert lines[4] == "| free | 2.0 | 0.0 |  |  |"
    assert lines[5] == "| broken | failed | | | ValueError: head_dim 7 |"
    assert lines[8] == "| not faster | 2.0 | 1.0 | 0.50 | 1 kept, 1 MISSED |"


def test_results_are_json_and_reported_after_every_case() -> None:
    told: list[int] = []
    found = report(CASES, 1e9, two_microseconds, lambda so_far: told.append(len(so_far["bars"])))
    assert told == [1, 2, 2, 3, 3, 5, 7, 8]
    assert json.loads(json.dumps(found)) == found
    assert found["failed"] == ["broken: ValueError: head_dim 7"]  # a peer may fail
    assert found["bars"][1] == {
        "name": "slow, against floor",
        "at_most": 1.5,
        "value": pytest.approx(2.0),
        "kept": False,
    }
    assert found == found_in(list(measure(CASES, 1e9, two_microseconds)), 1e9)


def test_every_case_can_be_made(reference_ops: Ops) -> None:
    """Runs all allocations of the GPU cases, on a device without memory."""
    found = report(all_cases(reference_ops, META), 1e12, two_microseconds)
    assert found["failed"] == []
    assert len(found["bars"]) > 20


def test_the_cases_of_a_bar_come_before_it(reference_ops: Ops) -> None:
    seen: set[str] = {FLOOR}
    for case in all_cases(reference_ops, META):
        assert {bar.of for bar in case.bars} <= seen, case.name
        seen.add(case.name)
    assert any("flex_attention, 16 x 16 nodes" in name for name in seen)


def test_without_a_gpu_it_says_so_and_succeeds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert kernels.main() == 0
    assert capsys.readouterr().out == "skipped: no CUDA device\n"


def test_the_report_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kernels, "triton_operations", lambda: report(CASES, 1e9, two_microseconds))
    monkeypatch.setattr(machine, "facts", lambda: {"device": "x"})
    monkeypatch.setattr(machine, "device_slug", lambda: "some-gpu")
    assert kernels.main(tmp_path) == 1  # one operation fails
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("kernels-some-gpu-")
    assert len(json.loads(path.read_text())["operations"]) == len(CASES)
    assert "MISSED        2.00  at most 1.50    slow, against floor" in capsys.readouterr().out


def test_flushes_between_runs_are_taken_off() -> None:
    whole, flushes = [3.0, 3.2, 9.0], [1.0, 1.2, 1.1]
    assert seconds_per_run(whole, flushes, runs=20) == pytest.approx((3.2 - 1.1) / 20)
    assert seconds_per_run(flushes, whole, runs=RUNS) == device_timing.SHORTEST


class Event:
    """An event that, as on a device, has no time until it was waited for."""

    def __init__(self, at: float) -> None:
        self.at = at
        self.is_over = False

    def synchronize(self) -> None:
        self.is_over = True

    def elapsed_time(self, other: Event) -> float:
        if not other.is_over:
            raise RuntimeError("Both events must be completed before calculating elapsed time.")
        return other.at - self.at


def test_spans_are_waited_for() -> None:
    def spans() -> list[tuple[Event, Event]]:
        return [(Event(start), Event(start + 2)) for start in (0.0, 5.0, 7.5)]

    assert durations_ms(spans()) == [2.0, 2.0, 2.0]
    waited = spans()
    for start, _ in waited:  # the device passes the begin of a span before its end
        start.is_over = True
    assert pauses_ms(waited) == [3.0, 0.5]


@pytest.mark.skipif(not triton_env.INSTALLED, reason=triton_env.MISSING)
def test_measured_operations_are_those_of_a_server_with_the_same_settings() -> None:
    device = torch.device("cuda")
    backend = triton_ops(device).backends["rank_drafts"]
    assert (backend.name, triton_ops(device).activation_dtype) == ("triton", torch.bfloat16)
    separate = triton_ops(device, "kernels.fused_drafting=false")
    reasons = {separate.backends[name].reason for name in DRAFTING_OPERATIONS}
    assert reasons == {"kernels.fused_drafting is off"}
