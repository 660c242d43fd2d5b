"""What the network sees at every point beside the graph."""

from __future__ import annotations

import numpy as np
from scipy.spatial import cKDTree

from syncspec.graph import Basis
from syncspec.shapes import Floats

HEAT_TIMES = (5.0, 20.0, 80.0, 320.0)
NORMAL_NEIGHBOURS = 12
NUM_FEATURES = 3 + 4 + len(HEAT_TIMES)
INPUTS = {  # columns that a network may see
    "all": slice(0, NUM_FEATURES),
    "coordinates": slice(0, 3),
    "no coordinates": slice(3, NUM_FEATURES),
}


def point_features(points: Floats, basis: Basis) -> Floats:
    """Coordinates, |normal| by axis, surface variation, heat kernel signatures. [N, 11]

    None depends on the signs of eigenvectors or of normals.
    """
    return np.hstack([points, _local_shape(points), heat_signature(basis)])


def heat_signature(basis: Basis) -> Floats:
    """log(N sum_k exp(-t f_k) phi_k(x)^2) at the times t, f the frequencies. [N, T]

    The heat kernel signature of Sun, Ovsjanikov and Guibas (2009).
    """
    decay = np.exp(-np.outer(basis.frequencies, HEAT_TIMES))  # [K, T]
    heat = len(basis.vectors) * (basis.vectors**2) @ decay
    signature: Floats = np.log(heat + 1e-6)
    return signature


def _local_shape(points: Floats) -> Floats:
    """The normal's magnitudes along the axes, and the smallest of the three variances of the
    neighbourhood as a share of their sum. [N, 4]"""
    count = min(NORMAL_NEIGHBOURS, len(points))
    _, others = cKDTree(points).query(points, count)
    near = points[others] - points[others].mean(axis=1, keepdims=True)
    variances, axes = np.linalg.eigh(np.einsum("nki,nkj->nij", near, near))
    share = variances[:, :1] / np.maximum(variances.sum(axis=1, keepdims=True), 1e-12)
    return np.hstack([np.abs(axes[:, :, 0]), share])
