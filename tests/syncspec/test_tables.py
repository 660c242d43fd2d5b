"""Results as tables and curves."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("scipy", reason="syncspec needs scipy: pip install .[syncspec]")

from syncspec.pictures import draw_pck
from syncspec.tables import mean_pck, table


def run(network: str, iou: float, **more: object) -> dict[str, object]:
    scores = {split: {"instance": iou, "category": iou} for split in ("seen", "unseen")}
    return {"network": network, "scores": scores, **more}


def pck(share: float) -> dict[str, dict[str, float]]:
    shares = {"0.02": 0.0, "0.05": share, "0.1": share, "0.2": 1.0}
    return {"seen": shares, "unseen": shares}


HARD = {
    "map_errors": {"train": 0.125, "unseen": 0.375},
    "robustness": {"noise 0.1": 0.25},
    "seconds_per_shape": {"network": 0.5},
}
RESULTS = {
    "runs": [
        run("plain", 0.5, pck=pck(0.2)),
        run("full", 0.75, **HARD),
        run("plain", 0.7, pck=pck(0.4)),
    ]
}


def test_tables_have_means_and_ranges_over_seeds() -> None:
    lines = table(RESULTS).splitlines()
    spread = "0.600 (0.500 to 0.700)"
    assert f"| plain | 2 | {' | '.join([spread] * 4)} |" in lines
    assert "| full | 1 | 0.750 | 0.750 | 0.750 | 0.750 |" in lines
    found = ["0.000 (0.000 to 0.000)", *["0.300 (0.200 to 0.400)"] * 2, "1.000 (1.000 to 1.000)"]
    assert f"| plain (seeds: 2) | {' | '.join(found)} |" in lines
    assert "| full | 0.125 | 0.375 |" in lines
    assert lines[-4:] == [
        "| --- | ---: |",
        "| noise 0.1 | 0.250 |",
        "",
        "Time per shape, full, at best: network 0.50 s.",
    ]


def test_curves_are_means_over_seeds(tmp_path: Path) -> None:
    curves = mean_pck(RESULTS, "seen")
    assert curves["plain"]["0.05"] == pytest.approx(0.3)
    assert set(curves) == {"plain"}
    pytest.importorskip("matplotlib", reason="not installed")
    for number, found in enumerate((curves, {})):
        draw_pck(tmp_path / f"{number}.png", {"seen": found})
        assert (tmp_path / f"{number}.png").stat().st_size > 1000
