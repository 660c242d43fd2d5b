"""The GPU check: without a GPU it skips itself, and one part's failure does not stop the others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check, gpu_group
from benchmarks.kernel_cases import FLOOR, Bar, Case, all_cases
from benchmarks.kernels import measure, table
from kernels.ops import Ops


def test_without_a_gpu_it_says_so_and_succeeds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main() == 0
    assert capsys.readouterr().out == "skipped: no CUDA device\n"


def test_a_part_that_fails_is_named_and_the_rest_goes_on() -> None:
    def broken() -> dict[str, object]:
        raise RuntimeError("no such kernel")

    found = gpu_check.run_parts(
        {"one": broken, "two": lambda: {"failed": ["a differs from b"]}, "three": lambda: {"x": 1}}
    )
    assert found["failures"] == ["one: RuntimeError: no such kernel", "two: a differs from b"]
    assert found["three"]["x"] == 1


def test_an_operation_is_compared_with_the_time_its_bytes_take(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run_quickly() -> object:
        return None

    def make_broken() -> object:
        raise ValueError("head_dim 7")

    monkeypatch.setattr("benchmarks.kernels.seconds_of", lambda run: 2e-6)
    cases = [
        Case("fast", 1000, lambda: run_quickly, bars=(Bar(2.5),)),
        Case("slow", 1000, lambda: run_quickly, bars=(Bar(1.5),)),
        Case("free", 0, lambda: run_quickly),
        Case("broken", 1000, make_broken),  # type: ignore[arg-type]
        Case("peer", 1000, make_broken, is_peer=True),  # type: ignore[arg-type]
        Case("as fast", 1000, lambda: run_quickly, bars=(Bar(3.0), Bar(1.0, "fast"))),
        Case("not faster", 1000, lambda: run_quickly, bars=(Bar(3.0), Bar(0.9, "fast"))),
        Case("unknown", 1000, lambda: run_quickly, bars=(Bar(1.0, "peer"),)),
    ]
    rows = list(measure(cases, bandwidth=1e9))
    assert [row.kept for row in rows] == [True, False, None, False, None, True, False, None]
    assert rows[0].share_of_floor == pytest.approx(0.5)
    assert "head_dim 7" in rows[3].bar
    assert rows[6].bar == "at most 3.00 x floor: 2.00; at most 0.90 x fast: 1.00"
    assert rows[7].bar == "at most 1.00 x peer: no time of it"
    assert table(rows).count("\n") == 9


def test_a_case_comes_after_its_peers(reference_ops: Ops) -> None:
    seen: set[str] = {FLOOR}
    for case in all_cases(reference_ops, torch.device("meta")):
        assert {bar.of for bar in case.bars} <= seen, case.name
        seen.add(case.name)
    assert any("flex_attention, 16 x 16 nodes" in name for name in seen)


def test_the_command_is_in_the_makefile() -> None:
    makefile = Path(gpu_check.ROOT, "Makefile").read_text(encoding="utf-8")
    assert "gpu-check:" in makefile
    assert "-m benchmarks.gpu_check" in makefile


def test_a_wrong_sum_of_a_group_is_reported() -> None:
    cpu = torch.device("cpu")
    assert gpu_group.sums(lambda x: x, cpu)["failed"] == []
    assert len(gpu_group.sums(lambda x: 2 * x, cpu)["failed"]) == len(gpu_group.SIZES)
