"""What `aerie plan` predicts beside what was measured or published, from files of results.

Every row of benchmarks/results/planning-*.json names a deployment, a number and its unit. All
predictions come from the one configs/plan/calibration.yaml. A file of rounds of earlier code names
the constants of that code: how many kernels it launched, and what they took.

    python -m benchmarks.planned     # prints the tables that docs/planning.md shows
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, cast, get_args

from configs.planning import Calibration, Gpu, load_calibration, load_gpu, shipped_models
from engine.step.shape import ROOT, DynamicShape, StaticShape, TreeShape
from server.assembly.drafting import tree_shape
from server.assembly.planning import AssumedHead, assumed_head, head_sizes
from server.planning.costs import Machine
from server.planning.prediction import MILLI
from server.planning.products import HeadSizes
from server.planning.rounds import Deployment, prefill_cost, round_cost
from server.planning.sizes import ModelSizes

RESULTS = Path(__file__).resolve().parent / "results"
PUBLISHED = "planning-published.json"
FILES = ("planning-h200-2026-11-27.json", "planning-h200-2026-11-28.json", PUBLISHED)
WHOLE = "eagle3-whole"  # an EAGLE-3 head that drafts all of the target's tokens
Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Comparison:
    """A row and its prediction."""

    row: Row
    measured: tuple[float, float]  # the lowest and the highest value
    predicted: float

    @property
    def error(self) -> float:
        """Relative to the nearest measured value; 0 between both."""
        low, high = self.measured
        return self.predicted / min(max(self.predicted, low), high) - 1


def compare(content: Row, calibration: Calibration | None = None) -> list[Comparison]:
    """All rows of a file of results."""
    found = (calibration or load_calibration()).model_copy(update=content.get("constants", {}))
    return [_compared(row, found) for row in content["rows"]]


def read(name: str) -> Row:
    content: Row = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return content


def _compared(row: Row, calibration: Calibration) -> Comparison:
    measured = row["measured"] if isinstance(row["measured"], list) else [row["measured"]] * 2
    return Comparison(row, (measured[0], measured[-1]), _predicted(row, calibration))


def _predicted(row: Row, calibration: Calibration) -> float:
    deployment = deployment_of(row, calibration)
    if row["unit"] == "prompt tokens/s":
        spent_us = prefill_cost(deployment, row["prompt"], row["chunk"]).total
        return float(row["prompt"] / spent_us * 1e6)
    shape = _shape(row["tree"])
    spent_ms = round_cost(deployment, row["batch"], row["context"], shape).total * MILLI
    tokens = row.get("tokens", 1.0)
    if row["unit"] == "x plain":
        plain = round_cost(deployment, row["batch"], row["context"], ROOT).total * MILLI
        return float(plain * tokens / spent_ms)
    of_unit = {
        "ms/round": spent_ms,
        "ms/token": spent_ms / tokens,
        "tokens/s": row["batch"] * tokens / spent_ms * 1000,
    }
    return float(of_unit[row["unit"]])


def deployment_of(row: Row, calibration: Calibration) -> Deployment:
    """The deployment that a row names."""
    target = _target(row["model"])
    return Deployment(
        machine=Machine(_gpu(row["gpu"]), calibration, row["ranks"]),
        target=target,
        head=_head(row.get("head"), target),
        run_ahead=row.get("run_ahead", True),
    )


@cache
def _target(name: str) -> ModelSizes:
    return ModelSizes.from_config(json.loads(shipped_models()[name].read_text(encoding="utf-8")))


@cache
def _gpu(name: str) -> Gpu:
    return load_gpu(name)


@cache
def _head(kind: str | None, target: ModelSizes) -> HeadSizes | None:
    if kind is None:
        return None
    whole = kind == WHOLE
    known = "eagle3" if whole else kind
    assert known in get_args(AssumedHead)
    head = assumed_head(cast(AssumedHead, known), target)
    if whole:
        head = replace(head, draft_vocab_size=target.vocab_size)
    return head_sizes(head, target, replicated=False)


def _shape(tree: object) -> TreeShape:
    if isinstance(tree, str):
        return _named_shape(tree)
    assert isinstance(tree, Mapping)
    if "parents" in tree:
        return StaticShape("given", tuple(tree["parents"]))
    return DynamicShape("given", **tree)


@cache
def _named_shape(name: str) -> TreeShape:
    return tree_shape(name)


def table(content: Row) -> Iterable[str]:
    """A Markdown table of a file of results beside predictions."""
    sourced = any("source" in row for row in content["rows"])
    head = ["source"] * sourced + ["what", "batch", "unit", "measured", "predicted", "error"]
    yield f"| {' | '.join(head)} |"
    yield f"| {' | '.join('---:' if name in head[-3:] else '---' for name in head)} |"
    for found in compare(content):
        yield f"| {' | '.join(_cells(found, sourced))} |"


def _cells(found: Comparison, sourced: bool) -> Sequence[str]:
    row, (low, high) = found.row, found.measured
    measured = _number(low) if low == high else f"{_number(low)} to {_number(high)}"
    cells = (
        _what(row),
        str(row.get("batch", 1)),
        row["unit"],
        measured,
        _number(found.predicted),
        f"{found.error:+.0%}",
    )
    return (row["source"], *cells) if sourced else cells


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"


def _what(row: Row) -> str:
    """The deployment in words."""
    if "chunk" in row:
        return f"prompt of {row['prompt']:,}, chunks of {row['chunk']:,}"
    name = row["model"].partition("/")[2].removesuffix("-FP8").removesuffix("-Instruct")
    gpus = row["gpu"].upper() if row["ranks"] == 1 else f"{row['ranks']} x {row['gpu'].upper()}"
    drafted = f"{_tree_name(row['tree'])}, {row['head'] or 'no head'}"
    waits = "" if row["run_ahead"] else ", waits for the host"
    return f"{name}, {gpus}, {drafted if row['tree'] != 'root' else 'plain'}{waits}"


def _tree_name(tree: object) -> str:
    if isinstance(tree, str):
        return tree
    assert isinstance(tree, Mapping)
    if "parents" in tree:
        return f"{len(tree['parents'])} nodes"
    return f"{tree['num_nodes']} nodes of {tree['max_depth']} levels"


def main() -> None:
    for name in FILES:
        print("\n".join(table(read(name))), end="\n\n")


if __name__ == "__main__":
    main()
