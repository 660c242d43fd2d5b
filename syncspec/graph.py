"""A shape's graph and the lowest eigenpairs of its normalised Laplacian, its Fourier basis."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import numpy as np
from safetensors.numpy import load_file, save_file
from scipy.sparse import csr_array, diags_array, eye_array
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import eigsh
from scipy.spatial import cKDTree

from syncspec.shapes import Floats, checked_points

NUM_PAIRS = 100
NUM_NEIGHBOURS = 5
MOST_NEIGHBOURS = 200
GROWTH = 1.2  # of the number of neighbours, until the graph is connected
NEAREST = 1e-3  # distances below this, in mean distances to a neighbour, count as this
# Of edges. The first is the default: an eigenvector is a smooth function times the square root of
# the degree, and with 1/d^2 degrees jump from point to point: random points come in close pairs.
WEIGHTS = ("gaussian", "inverse-square")
DENSE_BELOW = 300  # points: LAPACK is faster there, and ARPACK cannot give all pairs
REFERENCE_POINTS = 2000
MEAN_FREQUENCY = 0.01
FORM = 1  # of the cached files


@dataclass(frozen=True)
class Basis:
    """The lowest eigenpairs of a shape's Laplacian, in ascending order."""

    values: Floats  # [K]
    vectors: Floats  # [N, K], orthonormal columns

    @property
    def frequencies(self) -> Floats:
        """Eigenvalues, scaled so that their mean is 0.01, as with 2,000 points of a surface. [K]

        An eigenvalue is smaller the denser the points are: about as 1 / N on a surface, and as
        1 / N^2 along something thin. Without scaling, density would change a kernel's width.
        """
        return self.values * (MEAN_FREQUENCY / max(float(self.values.mean()), 1e-12))


def eigenbasis(
    points: Floats,
    num_pairs: int = NUM_PAIRS,
    num_neighbours: int = NUM_NEIGHBOURS,
    weights: str = WEIGHTS[0],
    source: str = "the shape",
    *,
    tied: bool = False,
) -> Basis:
    """The `num_pairs` lowest eigenpairs of the graph of `points` [N, 3]; `tied` as in
    `connected_graph`.

    The same points give the same basis: ARPACK starts from a fixed vector, and in every eigenvector
    the entry of largest magnitude is positive. Vectors of equal eigenvalues span the right space,
    but are not determined further; nothing here depends on which they are.

    Raises:
        ValueError: points that are not finite, fewer of them than eigenpairs, or a graph that
            falls apart.
    """
    points = checked_points(points, source)
    if len(points) < num_pairs:
        raise ValueError(
            f"{source} has {len(points)} points, fewer than the {num_pairs} eigenpairs asked for"
        )
    graph = connected_graph(points, num_neighbours, weights, tied=tied, source=source)
    return lowest_pairs(laplacian(graph), num_pairs)


def connected_graph(
    points: Floats,
    num_neighbours: int = NUM_NEIGHBOURS,
    weights: str = WEIGHTS[0],
    most_neighbours: int = MOST_NEIGHBOURS,
    *,
    tied: bool = False,
    source: str = "the shape",
) -> csr_array:
    """The graph of nearest neighbours, with as many neighbours as it needs to be connected.

    `tied`: with `num_neighbours`, and an edge between the nearest points of pieces that lie apart.

    Raises:
        ValueError: it is not tied, and not connected with `most_neighbours` either.
    """
    if tied:
        return _with_ties(neighbour_graph(points, num_neighbours, weights), points)
    count = num_neighbours
    while True:
        graph = neighbour_graph(points, count, weights)
        pieces, labels = connected_components(graph, directed=False)
        if pieces == 1:
            return graph
        if count >= min(most_neighbours, len(points) - 1):
            sizes = sorted(np.bincount(labels).tolist(), reverse=True)
            raise ValueError(
                f"{source}: the graph of {len(points)} points falls into {pieces} pieces of "
                f"{sizes[:5]} points with {count} neighbours each; it must be connected, or the "
                "model trained with --tie-pieces"
            )
        count = min(max(count + 1, round(count * GROWTH)), most_neighbours, len(points) - 1)


def _with_ties(graph: csr_array, points: Floats) -> csr_array:
    """Every piece tied to the nearest other one, by an edge that weighs as much as the mean."""
    weight = graph.data.mean()
    while True:
        pieces, labels = connected_components(graph, directed=False)
        if pieces == 1:
            return graph
        inside = labels == np.bincount(labels).argmin()
        piece, others = np.flatnonzero(inside), np.flatnonzero(~inside)
        distances, nearest = cKDTree(points[others]).query(points[piece])
        ends = piece[distances.argmin()], others[nearest[distances.argmin()]]
        tie = csr_array(([weight, weight], (ends, ends[::-1])), shape=graph.shape)
        graph = csr_array(graph + tie)


def neighbour_graph(points: Floats, num_neighbours: int, weights: str) -> csr_array:
    """The symmetric weights of every point and its nearest neighbours. [N, N]

    A weight is exp(-d^2 / (2 s^2)) with s the mean distance to a neighbour, or 1/d^2; a pair in
    which only one point has the other as a neighbour gets half of it.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights is {weights!r}; it must be one of {WEIGHTS}")
    if not 0 < num_neighbours < len(points):
        raise ValueError(f"num_neighbours is {num_neighbours}; it must be 1 to {len(points) - 1}")
    distances, others = _neighbours(points, num_neighbours)
    mean = distances.mean()
    distances = np.maximum(distances, NEAREST * mean)  # of points in the same place
    near = distances / mean
    values = 1 / near**2 if weights == "inverse-square" else np.exp(-(near**2) / 2)
    rows = np.repeat(np.arange(len(points)), num_neighbours)
    one_way = csr_array((values.ravel(), (rows, others.ravel())), shape=(len(points),) * 2)
    return csr_array((one_way + one_way.T) / 2)


def _neighbours(points: Floats, count: int) -> tuple[Floats, Floats]:
    """Distances and numbers of the nearest other points. [N, count] each"""
    distances, others = cKDTree(points).query(points, count + 1)
    itself = others == np.arange(len(points))[:, None]
    itself[~itself.any(axis=1), -1] = True  # many points in one place: drop the farthest
    keep = ~itself
    return distances[keep].reshape(-1, count), others[keep].reshape(-1, count)


def laplacian(graph: csr_array) -> csr_array:
    """I - D^-1/2 W D^-1/2, with eigenvalues from 0 to 2. [N, N]"""
    scale = diags_array(1 / np.sqrt(np.asarray(graph.sum(axis=1)).ravel()))
    return csr_array(eye_array(graph.shape[0]) - scale @ graph @ scale)


def lowest_pairs(matrix: csr_array, num_pairs: int) -> Basis:
    """The lowest eigenpairs of a Laplacian, by shift and invert."""
    size = matrix.shape[0]
    if size < max(DENSE_BELOW, 2 * num_pairs):
        values, vectors = np.linalg.eigh(matrix.toarray())
    else:
        start = np.random.default_rng(0).normal(size=size)
        # Just below zero, where the lowest eigenvalue is: the shifted matrix can be inverted.
        held = min(size, num_pairs * 8 // 5)  # vectors: fewer steps than with scipy's number
        values, vectors = eigsh(matrix.tocsc(), num_pairs, sigma=-1e-3, v0=start, ncv=held)
    order = np.argsort(values)[:num_pairs]
    return Basis(np.maximum(values[order], 0.0), with_signs(vectors[:, order]))


def with_signs(vectors: Floats) -> Floats:
    """Columns turned so that the entry of largest magnitude is positive. [N, K]"""
    largest = np.abs(vectors).argmax(axis=0)
    found: Floats = vectors * np.sign(vectors[largest, np.arange(vectors.shape[1])])
    return found


@dataclass(frozen=True)
class BasisCache:
    """Eigenpairs in files, by a hash of the points and of how they were computed."""

    folder: Path
    num_pairs: int = NUM_PAIRS
    num_neighbours: int = NUM_NEIGHBOURS
    weights: str = WEIGHTS[0]
    tied: bool = False

    def get(self, points: Floats, source: str = "the shape") -> Basis:
        """From its file, or computed and put there."""
        path = self.folder / f"{self._key(points)}.safetensors"
        if path.exists():
            stored = load_file(path)
            return Basis(stored["values"].astype(float), stored["vectors"].astype(float))
        how = self.num_pairs, self.num_neighbours, self.weights
        basis = eigenbasis(points, *how, source, tied=self.tied)
        self._put(path, basis)
        return basis

    def _put(self, path: Path, basis: Basis) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{uuid4().hex}.tmp")  # others may compute the same
        vectors = np.ascontiguousarray(basis.vectors, dtype=np.float32)
        save_file({"values": basis.values, "vectors": vectors}, unfinished)
        unfinished.replace(path)

    def _key(self, points: Floats) -> str:
        how = f"{FORM} {self.num_pairs} {self.num_neighbours} {self.weights} {points.shape} "
        how += "tied " if self.tied else ""
        content = how.encode() + np.ascontiguousarray(points, dtype=np.float64).tobytes()
        return hashlib.sha256(content).hexdigest()[:32]
