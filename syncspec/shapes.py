"""A labelled shape, and the checks that points from outside must pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Category:
    """What the labels and keypoints of a kind of shape mean: names in their order."""

    name: str
    parts: tuple[str, ...]
    keypoints: tuple[str, ...] = ()


@dataclass(frozen=True)
class Shape:
    """Points of a surface with a part for each."""

    category: str
    points: Floats  # [N, 3]; y is up
    labels: Ints  # [N]
    keypoints: Floats  # [P, 3], empty where none are known
    name: str = ""


@dataclass(frozen=True)
class Dataset:
    """Shapes by the name of their split, e.g. "train", and what their numbers mean."""

    categories: Mapping[str, Category]
    splits: Mapping[str, tuple[Shape, ...]]

    def of(self, split: str, category: str) -> list[Shape]:
        """The shapes of one category in one split."""
        if split not in self.splits:
            raise ValueError(f"split {split!r} is unknown; there are {sorted(self.splits)}")
        return [shape for shape in self.splits[split] if shape.category == category]


def checked_points(points: npt.ArrayLike, source: str) -> Floats:
    """The points as float64 [N, 3].

    Raises:
        ValueError: no points, another shape than [N, 3], a value that is not finite, or all points
            in one place. The message names `source`.
    """
    array = np.asarray(points, dtype=np.float64)
    if array.size == 0:
        raise ValueError(f"{source} has no points")
    if array.ndim != 2 or array.shape[1] != 3:
        raise ValueError(f"{source} has points of shape {array.shape}; it must be [N, 3]")
    bad = np.flatnonzero(~np.isfinite(array).all(axis=1))
    if bad.size:
        raise ValueError(
            f"{source}: {bad.size} of {len(array)} points are not finite, first point {bad[0]}"
        )
    if np.ptp(array, axis=0).max() == 0:
        raise ValueError(f"{source}: all {len(array)} points lie in one place")
    return array


def normalised(shape: Shape) -> Shape:
    """Moved and scaled: the bounding box is centred, and its longest half side is 1."""
    low, high = shape.points.min(axis=0), shape.points.max(axis=0)
    centre, half = (low + high) / 2, (high - low).max() / 2
    return replace(
        shape,
        points=(shape.points - centre) / half,
        keypoints=(shape.keypoints - centre) / half,
    )


def resampled(shape: Shape, num_points: int, rng: np.random.Generator) -> Shape:
    """A random subset of the points, or all of them if there are no more than that."""
    if len(shape.points) <= num_points:
        return shape
    chosen = np.sort(rng.choice(len(shape.points), num_points, replace=False))
    return replace(shape, points=shape.points[chosen], labels=shape.labels[chosen])


def noisy(shape: Shape, deviation: float, rng: np.random.Generator) -> Shape:
    """Every point moved by normal noise of this standard deviation along each axis."""
    moved = shape.points + rng.normal(0.0, deviation, shape.points.shape)
    return replace(shape, points=moved)
