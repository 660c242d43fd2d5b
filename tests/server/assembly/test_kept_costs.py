"""Costs of steps outlive the engine; what cannot be used is ignored with a line in the log."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from engine.speculation.costs import Padding, Sample, StepCosts
from engine.step.shape import chain
from server.assembly.kept_costs import WRITER, KeptCosts

WORK = [Padding().work([length] * rows, chain(5), 8) for rows in (1, 4) for length in (0, 1, 5)]


def saved(kept: KeptCosts, head: str) -> StepCosts:
    costs = StepCosts.fitted([Sample(work, 0.01 + 0.002 * work.tokens) for work in WORK])
    kept.save(head, costs)
    for thread in threading.enumerate():
        if thread.name == WRITER:
            thread.join()
    return costs


def test_costs_are_found_again_for_the_same_engine_and_head_only(tmp_path: Path) -> None:
    costs = saved(KeptCosts(tmp_path, "engine"), "head")
    assert KeptCosts(tmp_path, "engine").load("head") == costs
    assert KeptCosts(tmp_path, "engine").load("other") is None
    assert KeptCosts(tmp_path, "other").load("head") is None


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{}",
        "[1]",
        '{"values": [1], "doubts": [1], "drifts": [1], "limits": [1]}',
        "NaN",
        "\x00",
    ],
)
def test_a_damaged_file_is_ignored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str
) -> None:
    kept = KeptCosts(tmp_path, "engine")
    saved(kept, "head")
    (path,) = (tmp_path / "step-costs").iterdir()
    path.write_text(content)
    assert kept.load("head") is None
    assert "cannot be used" in caplog.text


def test_a_number_that_is_none_is_no_cost(tmp_path: Path) -> None:
    kept = KeptCosts(tmp_path, "engine")
    saved(kept, "head")
    (path,) = (tmp_path / "step-costs").iterdir()
    path.write_text(path.read_text().replace("0.0", "NaN", 1))
    assert kept.load("head") is None


def test_where_nothing_can_be_written_the_log_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "step-costs").write_text("a file")
    saved(KeptCosts(tmp_path, "engine"), "head")
    assert "cannot be kept" in caplog.text
