"""Parts of the GPU check that can be judged without a GPU."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from benchmarks import gpu_check
from benchmarks.gpu.rounds import by_name, verdicts
from benchmarks.gpu.tiny import difference


def test_kernel_tests_report_every_file_as_it_ends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(path: Path) -> subprocess.CompletedProcess[str]:
        bad = path.name == "test_triton_moe.py"
        text = "FAILED tests/a.py::test_b - wrong\n1 failed" if bad else "3 passed"
        return subprocess.CompletedProcess([], int(bad), text, "")

    monkeypatch.setattr(gpu_check, "_run_tests", run)
    found = gpu_check.kernel_tests()
    assert found["failed"] == ["FAILED tests/a.py::test_b - wrong"]
    assert found["not_ended"] == []
    assert found["summaries"]["test_triton_moe.py"] == "1 failed"
    assert "test_triton_sm90.py" not in found["summaries"]
    results = [line for line in capsys.readouterr().out.splitlines() if line.startswith("RESULT ")]
    left = [len(json.loads(line.removeprefix("RESULT "))["not_ended"]) for line in results]
    assert left == list(range(len(found["summaries"])))[::-1]


def test_kernels_are_counted_per_step() -> None:
    events = [
        {"cat": "kernel", "name": "product", "dur": 8.0},
        {"cat": "kernel", "name": "product", "dur": 4.0},
        {"cat": "gpu_memcpy", "name": "copy", "dur": 2.0},
        {"cat": "cuda_runtime", "name": "cudaGraphLaunch", "dur": 9.0},
        {"name": "no category"},
    ]
    assert by_name(events, 2) == {
        "kernels": 1.5,
        "kernel_us": 7.0,
        "by_name": {"product": [1.0, 6.0], "copy": [0.5, 1.0]},
    }


def test_bars_of_rounds_need_only_what_was_measured() -> None:
    root = {"device_ms": 5.0, "gap_us": 10.0, "kernels": 442.0}
    chain3 = {"device_ms": 6.5, "gap_us": 10.0, "kernels": 942.0}
    many = {"device_ms": 6.0, "gap_us": 1300.0}
    found = {"floor_ms": 4.0, "rounds": {"root": root, "chain3": chain3, "root, 64 rows": many}}
    found["rounds"]["root, without overlap"] = root | {"device_ms": 10.0}
    values = {verdict.name: verdict.value for verdict in verdicts(found)}
    assert values["round of the 8B shape / reading its weights"] == 1.25
    assert values["chain3 adds, ms"] == 1.5
    assert values["root / root, without overlap"] == 0.5
    assert values["chain3 adds, kernels"] == 500
    assert values["host's time in a step, us: root, 64 rows"] == 1300
    assert verdicts({"floor_ms": 4.0, "rounds": {}}) == []


def test_texts_that_differ_are_named_with_their_first_difference() -> None:
    expected = {"a": [1, 2, 3], "b": [4], "accepted": [0]}
    assert difference("way", {"a": [1, 2, 3], "b": [4], "accepted": [9]}, expected) == []
    ours = {"a": [1, 9, 3], "b": [4, 5], "accepted": [0]}
    assert difference("way", ours, expected) == [
        "way: 'a' differs from token 1 of 3",
        "way: 'b' differs from token 1 of 1",
    ]
