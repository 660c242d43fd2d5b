"""Models on shapes they have not seen: parts, keypoints, density, noise and time."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from syncspec.graph import BasisCache
from syncspec.preparing import Prepared, prepare
from syncspec.scores import mean_ious, share_within
from syncspec.shapes import Shape
from syncspec.training import Model


@dataclass
class Evaluation:
    """What models of several categories reached on one split."""

    ious: dict[str, list[float]] = field(default_factory=dict)
    distances: dict[str, list[float]] = field(default_factory=dict)

    @property
    def instance_iou(self) -> float:
        return mean_ious(self.ious)[0]

    @property
    def category_iou(self) -> float:
        return mean_ious(self.ious)[1]

    @property
    def pck(self) -> dict[str, float]:
        """The share of all keypoints within each distance."""
        return share_within(np.concatenate([np.array(d) for d in self.distances.values()]))

    def lines(self) -> list[str]:
        """A table for people."""
        found = [
            f"{name:<12} {np.mean(ious):.3f} mIoU of {len(ious)} shapes"
            for name, ious in self.ious.items()
        ]
        if self.ious:
            found.append(f"instance mIoU {self.instance_iou:.4f}")
            found.append(f"category mIoU {self.category_iou:.4f}")
        if self.distances:
            found += [f"PCK within {limit}: {share:.3f}" for limit, share in self.pck.items()]
        return found


def evaluate(models: Mapping[str, Model], shapes: Mapping[str, Sequence[Prepared]]) -> Evaluation:
    """Each category's model on its shapes."""
    result = Evaluation()
    for name, model in models.items():
        if model.task == "parts":
            result.ious[name] = [model.iou(one) for one in shapes[name]]
        else:
            found = [model.keypoint_distances(one) for one in shapes[name]]
            result.distances[name] = np.concatenate(found).tolist()
    return result


def seconds_per_shape(model: Model, shapes: Sequence[Shape]) -> tuple[float, float]:
    """Median seconds for the basis and features, and for the network, without a cache."""
    prepared, predicted = [], []
    for shape in shapes:
        with TemporaryDirectory() as folder:
            start = time.perf_counter()
            one = prepare(shape, model.design, BasisCache(Path(folder)))
            middle = time.perf_counter()
            model.scores(one)
        prepared.append(middle - start)
        predicted.append(time.perf_counter() - middle)
    return float(np.median(prepared)), float(np.median(predicted))
