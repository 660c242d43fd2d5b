"""Parts and keypoints of a whole shape, by a model that sees some of its points."""

from __future__ import annotations

import numpy as np
from scipy.spatial import cKDTree

from syncspec.graph import REFERENCE_POINTS, BasisCache
from syncspec.preparing import Prepared, prepare
from syncspec.shapes import Floats, Ints, Shape, normalised, resampled
from syncspec.training import Model


def segment(
    model: Model, points: Floats, cache: BasisCache, seed: int = 0, source: str = ""
) -> Ints:
    """The part of every point. [N, 3] -> [N]

    The network sees at most 2,000 random points; the others get the label of the nearest of these.

    Raises:
        ValueError: a model for keypoints, or points that have no basis; it names `source`.
    """
    whole, some = _prepared(model, points, "parts", cache, seed, source)
    spread: Ints = model.parts(some)[cKDTree(some.shape.points).query(whole.points)[1]]
    return spread


def find_keypoints(
    model: Model, points: Floats, cache: BasisCache, seed: int = 0, source: str = ""
) -> Floats:
    """The place of every keypoint, one of the points. [N, 3] -> [P, 3]

    Raises:
        ValueError: a model for parts, or points that have no basis; it names `source`.
    """
    whole, some = _prepared(model, points, "keypoints", cache, seed, source)
    places: Floats = points[cKDTree(whole.points).query(model.keypoints(some))[1]]
    return places


def _prepared(
    model: Model, points: Floats, task: str, cache: BasisCache, seed: int, source: str
) -> tuple[Shape, Prepared]:
    """All points, normalised, and those that the network sees."""
    if model.task != task:
        raise ValueError(f"the model finds {model.task}; this needs one that finds {task}")
    unknown = np.zeros(len(points), dtype=np.int64)
    whole = normalised(Shape(model.category.name, points, unknown, np.empty((0, 3)), source))
    some = resampled(whole, REFERENCE_POINTS, np.random.default_rng(seed))
    return whole, prepare(some, model.design, cache)
