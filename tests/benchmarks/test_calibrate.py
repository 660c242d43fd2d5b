"""The constants of `aerie plan` are fitted to measured rounds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.calibrate import FITTED, fit, main, rewritten, rows_of_gpu_check
from benchmarks.planned import FILES, compare, read
from configs.planning import CALIBRATION, load_calibration

FIRST = read(FILES[0])
ROWS = {
    "rows": [row for row in FIRST["rows"] if row.get("batch") in (1, 64)][:6],
    "constants": FIRST["constants"],
}


def test_a_fit_finds_constants_that_were_moved() -> None:
    shipped = load_calibration()
    exact = {
        **ROWS,
        "rows": [{**found.row, "measured": found.predicted} for found in compare(ROWS, shipped)],
    }
    moved = shipped.model_copy(update={"memory_share": 0.7, "compute_share": 0.6})
    found = fit(exact, moved, ("memory_share", "compute_share"), steps=8)
    assert found.memory_share == pytest.approx(shipped.memory_share, rel=0.02)
    assert found.compute_share == pytest.approx(shipped.compute_share, rel=0.05)


def test_a_fit_does_not_leave_what_is_possible() -> None:
    fast = {**ROWS, "rows": [{**row, "measured": row["measured"] / 2} for row in ROWS["rows"]]}
    assert fit(fast, load_calibration(), ("memory_share",), steps=3).memory_share == 1


def test_only_fitted_values_of_the_file_change() -> None:
    text, shipped = CALIBRATION.read_text(encoding="utf-8"), load_calibration()
    assert rewritten(text, shipped) == text
    changed = rewritten(text, shipped.model_copy(update={"memory_share": 0.5, "kernel_us": 9.0}))
    assert changed == text.replace("\nmemory_share: 0.9\n", "\nmemory_share: 0.5\n")
    assert "kernel_us" not in FITTED


def test_what_gpu_check_writes_can_be_fitted(tmp_path: Path) -> None:
    times = {"step_ms": 5.4, "device_ms": 4.9}
    content = {"parts": {"8B step": {"steps": {"root": times, "eagle3 chain3": times, "x": times}}}}
    rows = rows_of_gpu_check(content, "h200")["rows"]
    assert [(row["tree"], row["run_ahead"], row["measured"]) for row in rows] == [
        ("root", True, 4.9),
        ("root", False, 5.4),
        ("chain3", True, 4.9),
        ("chain3", False, 5.4),
    ]
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    main([str(path), "--output", str(tmp_path / "calibration.yaml")])
    assert load_calibration(tmp_path / "calibration.yaml").kernel_us == load_calibration().kernel_us
    with pytest.raises(ValueError, match="hold no part"):
        rows_of_gpu_check({}, "h200")
