"""The laws of the graph, its Laplacian and its eigenpairs; points that have none."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("scipy", reason="syncspec needs scipy: pip install .[syncspec]")

import numpy as np
from scipy.sparse.csgraph import connected_components
from scipy.spatial.transform import Rotation

from syncspec.generator import generate
from syncspec.graph import (
    WEIGHTS,
    Basis,
    BasisCache,
    connected_graph,
    eigenbasis,
    laplacian,
    lowest_pairs,
    neighbour_graph,
)

POINTS = generate("chair", 400, 0).points


def planted(size: int = 40) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(size, 3))


@pytest.mark.parametrize("weights", WEIGHTS)
def test_the_laplacian_is_symmetric_with_eigenvalues_from_zero_to_two(weights: str) -> None:
    graph = connected_graph(POINTS, weights=weights)
    matrix = laplacian(graph).toarray()
    values = np.linalg.eigvalsh(matrix)
    degrees = np.asarray(graph.sum(axis=1)).ravel()
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-12)
    np.testing.assert_allclose(matrix @ np.sqrt(degrees), 0, atol=1e-6 * np.sqrt(degrees.max()))
    assert values[0] == pytest.approx(0, abs=1e-8)
    assert values[1] > 1e-8  # one piece
    assert values[-1] <= 2 + 1e-8


def test_weights_are_those_of_the_distances() -> None:
    line = np.array([[0.0, 0, 0], [1, 0, 0], [3, 0, 0]])  # neighbours: 0-1, 1-0, 2-1
    ratio = np.array([[0, 1, 0], [1, 0, 1 / 8], [0, 1 / 8, 0]])  # 2-1 counts half
    graph = neighbour_graph(line, 1, "inverse-square").toarray()
    np.testing.assert_allclose(graph / graph.max(), ratio)


@pytest.mark.parametrize("size", [120, 400], ids=["dense", "sparse"])
def test_eigenpairs_are_the_lowest_orthonormal_and_repeatable(size: int) -> None:
    points = POINTS[:size] if size == 400 else generate("mug", size, 0).points
    matrix = laplacian(connected_graph(points))
    basis = lowest_pairs(matrix, 50)
    np.testing.assert_allclose(basis.values, np.linalg.eigvalsh(matrix.toarray())[:50], atol=1e-8)
    np.testing.assert_allclose(basis.vectors.T @ basis.vectors, np.eye(50), atol=1e-8)
    np.testing.assert_allclose(matrix @ basis.vectors, basis.vectors * basis.values, atol=1e-7)
    again = lowest_pairs(matrix, 50)
    assert np.array_equal(again.vectors, basis.vectors)
    assert (np.take_along_axis(basis.vectors, np.abs(basis.vectors).argmax(0)[None], 0) > 0).all()


def test_a_rigid_motion_and_a_scale_leave_the_basis_as_it_is() -> None:
    turned = 3.7 * POINTS @ Rotation.from_euler("xyz", [0.4, 1.1, -0.7]).as_matrix().T + [5, -2, 1]
    before, after = eigenbasis(POINTS, 30), eigenbasis(turned, 30)
    np.testing.assert_allclose(after.values, before.values, atol=1e-8)
    np.testing.assert_allclose(np.abs(after.vectors), np.abs(before.vectors), atol=1e-4)


def test_another_order_of_points_gives_the_basis_in_that_order() -> None:
    order = np.random.default_rng(0).permutation(len(POINTS))
    before, after = eigenbasis(POINTS, 20), eigenbasis(POINTS[order], 20)
    np.testing.assert_allclose(after.values, before.values, atol=1e-8)
    np.testing.assert_allclose(np.abs(after.vectors), np.abs(before.vectors[order]), atol=1e-4)


def test_frequencies_depend_little_on_the_number_of_points() -> None:
    few, many = (eigenbasis(generate("mug", n, 5).points, 60) for n in (1000, 2000))
    assert np.median(few.values[10:] / many.values[10:]) > 1.7
    assert np.median(few.frequencies[10:] / many.frequencies[10:]) == pytest.approx(1, abs=0.2)


def test_points_in_one_place_are_neighbours_and_no_error() -> None:
    doubled = np.concatenate([POINTS, POINTS[:30], POINTS[:30], POINTS[:1].repeat(9, axis=0)])
    assert np.isfinite(eigenbasis(doubled, 20).vectors).all()


@pytest.mark.parametrize(
    ("points", "named"),
    [
        (np.empty((0, 3)), "a.ply has no points"),
        (np.zeros((200, 2)), r"shape \(200, 2\); it must be \[N, 3\]"),
        (np.ones((200, 3)), "lie in one place"),
        (np.where(np.arange(200)[:, None] == 7, np.nan, planted(200)), "not finite, first point 7"),
        (planted(40), "40 points, fewer than the 100 eigenpairs"),
        (np.concatenate([planted(300), planted(300) + 1000]), r"2 pieces of \[300, 300\]"),
    ],
    ids=["empty", "flat", "one place", "nan", "few", "disconnected"],
)
def test_points_without_a_basis_are_refused(points: np.ndarray, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        eigenbasis(points, source="a.ply")


def test_pieces_that_lie_apart_can_be_tied_by_their_nearest_points() -> None:
    pieces = zip((planted(300), planted(120), planted(150)), (0, 50, -90), strict=True)
    apart = np.concatenate([points + np.array([x, 0, 0]) for points, x in pieces])
    graph = connected_graph(apart, tied=True)
    assert connected_components(graph)[0] == 1
    near = graph[:300, 300:420].tocoo()
    assert near.nnz == 1
    ends = apart[near.coords[0][0], 0], apart[300 + near.coords[1][0], 0]
    assert ends[0] > apart[:300, 0].mean()
    assert ends[1] < apart[300:420, 0].mean()
    assert near.data[0] == pytest.approx(neighbour_graph(apart, 5, "gaussian").data.mean(), rel=0.1)
    assert graph[300:420, 420:].nnz == 0  # each to the nearest
    basis = eigenbasis(apart, 20, tied=True)
    np.testing.assert_allclose(basis.vectors.T @ basis.vectors, np.eye(20), atol=1e-8)
    one = planted(300)  # in one piece: nothing is added
    assert (connected_graph(one, tied=True) != neighbour_graph(one, 5, "gaussian")).nnz == 0


def test_the_cache_gives_what_was_computed(tmp_path: Path) -> None:
    cache = BasisCache(tmp_path / "new", num_pairs=20)
    first = cache.get(POINTS)
    (file,) = cache.folder.iterdir()
    changed = file.stat().st_mtime_ns
    second = cache.get(POINTS)
    assert file.stat().st_mtime_ns == changed
    assert isinstance(second, Basis)
    np.testing.assert_allclose(second.vectors, first.vectors, atol=1e-6)
    cache.get(POINTS * [1, 2, 1])
    BasisCache(cache.folder, num_pairs=10).get(POINTS)
    BasisCache(cache.folder, num_pairs=20, tied=True).get(POINTS)
    assert len(list(cache.folder.iterdir())) == 4
