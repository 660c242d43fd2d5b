"""The results of `syncspec.comparison` as Markdown, and as curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

SHOWN_DISTANCES = ("0.02", "0.05", "0.1", "0.2")
Run = Mapping[str, Any]


def table(results: Mapping[str, Any]) -> str:
    """All tables: means over seeds, and the lowest and highest."""
    runs = _by_network(results)
    sections = [_iou_table(runs), _map_table(runs), _pck_table(runs), _robustness_table(runs)]
    return "\n\n".join("\n".join(lines) for lines in sections if lines)


def mean_pck(results: Mapping[str, Any], split: str) -> dict[str, dict[str, float]]:
    """PCK by network and by distance, of those networks that found keypoints."""
    return {
        name: {
            distance: float(np.mean([run["pck"][split][distance] for run in runs]))
            for distance in runs[0]["pck"][split]
        }
        for name, runs in _having(_by_network(results), "pck").items()
    }


def _by_network(results: Mapping[str, Any]) -> dict[str, list[Run]]:
    names = dict.fromkeys(run["network"] for run in results["runs"])
    return {name: [run for run in results["runs"] if run["network"] == name] for name in names}


def _having(runs: Mapping[str, list[Run]], key: str) -> dict[str, list[Run]]:
    having = {name: [run for run in found if key in run] for name, found in runs.items()}
    return {name: found for name, found in having.items() if found}


def _iou_table(runs: Mapping[str, list[Run]]) -> list[str]:
    splits = {"seen": "seen geometry", "unseen": "unseen geometry"}
    titles = [
        f"{told}: {kind} mIoU" for told in splits.values() for kind in ("instance", "category")
    ]
    lines = _header(["network", "seeds", *titles])
    for name, found in runs.items():
        cells = [
            _spread([run["scores"][split][kind] for run in found])
            for split in splits
            for kind in ("instance", "category")
        ]
        lines.append(_row([name, f"{len(found)}", *cells]))
    return lines


def _map_table(runs: Mapping[str, list[Run]]) -> list[str]:
    having = _having(runs, "map_errors")
    if not having:
        return []
    splits = list(next(iter(having.values()))[0]["map_errors"])
    lines = _header(["squared error of predicted maps, relative", *splits])
    for name, found in having.items():
        errors = [[run["map_errors"][split] for run in found] for split in splits]
        lines.append(_row([name, *map(_spread, errors)]))
    return lines


def _pck_table(runs: Mapping[str, list[Run]]) -> list[str]:
    having = _having(runs, "pck")
    if not having:
        return []
    titles = [f"within {distance}" for distance in SHOWN_DISTANCES]
    lines = _header(["keypoints of unseen geometry, found", *titles])
    for name, found in having.items():
        shares = [[run["pck"]["unseen"][distance] for run in found] for distance in SHOWN_DISTANCES]
        lines.append(_row([_counted(name, found), *map(_spread, shares)]))
    return lines


def _robustness_table(runs: Mapping[str, list[Run]]) -> list[str]:
    having = _having(runs, "robustness")
    if not having:
        return []
    lines = _header(["seen geometry, instance mIoU", *map(_counted, having, having.values())])
    for change in next(iter(having.values()))[0]["robustness"]:
        found = [[run["robustness"][change] for run in each] for each in having.values()]
        lines.append(_row([change, *map(_spread, found)]))
    for name, each in having.items():
        seconds = [run["seconds_per_shape"] for run in each]
        # At best: others may have shared the machine.
        told = [f"{part} {min(one[part] for one in seconds):.2f} s" for part in seconds[0]]
        lines += ["", f"Time per shape, {name}, at best: {', '.join(told)}."]
    return lines


def _header(titles: Sequence[str]) -> list[str]:
    return [_row(titles), _row(["---", *["---:"] * (len(titles) - 1)])]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _counted(name: str, runs: Sequence[Run]) -> str:
    return f"{name} (seeds: {len(runs)})"


def _spread(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"
