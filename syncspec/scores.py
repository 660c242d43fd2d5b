"""How good predictions are: intersection over union of parts, and distances of keypoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from syncspec.shapes import Floats, Ints

PCK_DISTANCES = (
    0.01,
    0.02,
    0.03,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
)  # of normalised shapes, whose longest half side is 1


def shape_iou(predicted: Ints, labels: Ints, num_parts: int) -> float:
    """Mean over the category's parts of intersection over union; 1 for a part that neither the
    labels nor the prediction has, as in ShapeNet's evaluation."""
    found = []
    for part in range(num_parts):
        union = np.sum((predicted == part) | (labels == part))
        both = np.sum((predicted == part) & (labels == part))
        found.append(both / union if union else 1.0)
    return float(np.mean(found))


def mean_ious(by_category: Mapping[str, Sequence[float]]) -> tuple[float, float]:
    """Instance mIoU (mean over all shapes) and category mIoU (mean over categories)."""
    every = [iou for ious in by_category.values() for iou in ious]
    return float(np.mean(every)), float(np.mean([np.mean(ious) for ious in by_category.values()]))


def share_within(distances: Floats, limits: Sequence[float] = PCK_DISTANCES) -> dict[str, float]:
    """PCK: the share of keypoints found within each distance."""
    return {f"{limit:g}": float(np.mean(distances <= limit)) for limit in limits}
