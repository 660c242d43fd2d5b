"""Predictions agree with what was measured and published, all from one calibration."""

from __future__ import annotations

import pytest

from benchmarks.planned import FILES, PUBLISHED, Comparison, compare, deployment_of, read
from configs.planning import load_calibration
from engine.step.shape import ROOT, chain
from server.planning.rounds import round_cost

MAVERICK = "meta-llama/Llama-4-Maverick-17B-128E-Instruct-FP8"
LLAMA_8B = "meta-llama/Llama-3.1-8B-Instruct"


def described(found: Comparison) -> str:
    return f"{found.row}: {found.predicted:.2f} ({found.error:+.1%})"


@pytest.mark.parametrize("name", FILES)
def test_rows_are_within_the_tolerance_unless_they_are_marked_as_missed(name: str) -> None:
    content = read(name)
    found = compare(content)
    wrong = [
        described(each)
        for each in found
        if (abs(each.error) <= content["tolerance"]) == ("missed" in each.row)
    ]
    assert wrong == []
    assert name == PUBLISHED or not [each for each in found if "missed" in each.row]


def speedup(model: str, ranks: int, batch: int, tokens: float) -> float:
    """Of a chain of 3 with a dense head of three layers, on H100s with 8k of context."""
    row = {"model": model, "gpu": "h100", "ranks": ranks, "head": "dense3"}
    deployment = deployment_of(row, load_calibration())
    plain = round_cost(deployment, batch, 8192, ROOT).total
    return tokens * plain / round_cost(deployment, batch, 8192, chain(3)).total


def test_speedups_change_with_the_batch_as_published() -> None:
    """arXiv:2508.08192: that of the 8B model grows with the batch, that of Maverick falls."""
    assert speedup(LLAMA_8B, 1, 64, 2.78) > speedup(LLAMA_8B, 1, 1, 2.78) + 0.05
    assert speedup(MAVERICK, 8, 32, 2.75) < speedup(MAVERICK, 8, 1, 2.75) - 0.3
