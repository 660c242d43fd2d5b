"""Labels for all points of a shape, however many, by a model that sees some of them."""

from __future__ import annotations

import numpy as np
from scipy.spatial import cKDTree

from syncspec.graph import REFERENCE_POINTS, BasisCache
from syncspec.preparing import prepare
from syncspec.shapes import Floats, Ints, Shape, normalised, resampled
from syncspec.training import Model


def segment(model: Model, points: Floats, cache: BasisCache, seed: int = 0) -> Ints:
    """The part of every point. [N, 3] -> [N]

    The network sees at most 2,000 random points; the others get the label of the nearest of these.
    """
    if model.task != "parts":
        raise ValueError(f"the model finds {model.task}; segmenting needs one for parts")
    unknown = np.zeros(len(points), dtype=np.int64)
    whole = normalised(Shape(model.category.name, points, unknown, np.empty((0, 3))))
    some = resampled(whole, REFERENCE_POINTS, np.random.default_rng(seed))
    labels = model.parts(prepare(some, model.design, cache))
    spread: Ints = labels[cKDTree(some.points).query(whole.points)[1]]
    return spread
