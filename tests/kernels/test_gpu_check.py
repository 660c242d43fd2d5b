"""The check for GPUs: it skips itself, and one part's failure does not stop the others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check, gpu_group
from benchmarks.kernel_cases import Case
from benchmarks.kernels import measure, table


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


def test_an_operation_is_held_against_the_time_its_bytes_take(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run_quickly() -> object:
        return None

    def make_broken() -> object:
        raise ValueError("head_dim 7")

    monkeypatch.setattr("benchmarks.kernels.seconds_of", lambda run: 2e-6)
    cases = [
        Case("fast", 1000, lambda: run_quickly, at_most=2.5),
        Case("slow", 1000, lambda: run_quickly, at_most=1.5),
        Case("free", 0, lambda: run_quickly),
        Case("broken", 1000, make_broken),  # type: ignore[arg-type]
    ]
    rows = list(measure(cases, bandwidth=1e9))
    assert [row.kept for row in rows] == [True, False, None, False]
    assert rows[0].share_of_floor == pytest.approx(0.5)
    assert "head_dim 7" in rows[3].bar
    assert table(rows).count("\n") == 5


def test_the_command_is_in_the_makefile() -> None:
    makefile = Path(gpu_check.ROOT, "Makefile").read_text(encoding="utf-8")
    assert "gpu-check:" in makefile
    assert "-m benchmarks.gpu_check" in makefile


def test_a_wrong_sum_of_a_group_is_reported() -> None:
    cpu = torch.device("cpu")
    assert gpu_group.sums(lambda x: x, cpu)["failed"] == []
    assert len(gpu_group.sums(lambda x: 2 * x, cpu)["failed"]) == len(gpu_group.SIZES)
