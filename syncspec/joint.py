"""The joint basis of a category, and functional maps from a shape's basis into it.

Shapes of a category that are aligned and scaled alike fill much the same voxels. The graphs of all
of them, added up over voxels, are one graph of the category; the lowest eigenvectors of its
Laplacian give the joint basis (section 4.3 of arXiv:1612.00606).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

from syncspec.graph import WEIGHTS, connected_graph, laplacian, lowest_pairs
from syncspec.shapes import Floats, Ints

LEAST_VALUE = 0.02  # of functions' products: those that nearly coincide on a shape count less


@dataclass(frozen=True)
class JointBasis:
    """Smooth functions on those voxels of a grid that shapes of the category fill.

    They are the lowest eigenvectors, each divided by the square root of the degrees: the first is
    constant, and they are orthonormal where a voxel counts by its degree.
    """

    grid: int  # voxels along each axis
    voxels: Ints  # [V, 3]
    degrees: Floats  # [V]
    functions: Floats  # [V, J]

    def at(self, points: Floats) -> Floats:
        """The joint basis at the points' voxels, or at the nearest filled ones. [N, J]"""
        cells = voxel_cells(points, self.grid)
        read: Floats = self.functions[cKDTree(self.voxels).query(cells)[1]]
        return read


def voxel_cells(points: Floats, grid: int) -> Ints:
    """The voxel of every point, after each axis is stretched to fill [-1, 1]. [N, 3]"""
    extent = np.maximum(np.abs(points).max(axis=0), 1e-9)
    cells: Ints = np.minimum((points / extent + 1) / 2 * grid, grid - 1).astype(np.int64)
    return cells


def joint_basis(
    shapes: Sequence[Floats],
    grid: int,
    num_functions: int,
    weights: str = WEIGHTS[0],
    *,
    tied: bool = False,
) -> JointBasis:
    """From the points of a category's shapes, each [N, 3].

    Raises:
        ValueError: no shapes, or the voxels they fill are fewer than the functions.
    """
    if not shapes:
        raise ValueError("a joint basis needs at least one shape; there are none")
    total = csr_array((grid**3, grid**3))
    for points in shapes:
        total = total + _on_voxels(
            connected_graph(points, weights=weights, tied=tied), points, grid
        )
    total.setdiag(0)
    total.eliminate_zeros()
    total, filled = _largest_piece(csr_array(total))
    if filled.size < num_functions:
        raise ValueError(
            f"the shapes fill {filled.size} voxels of a grid of {grid}, fewer than the "
            f"{num_functions} functions of the joint basis"
        )
    degrees = np.asarray(total.sum(axis=1)).ravel()
    vectors = lowest_pairs(laplacian(total), num_functions).vectors
    voxels = np.stack(np.unravel_index(filled, (grid,) * 3), axis=1)
    return JointBasis(grid, voxels, degrees, vectors / np.sqrt(degrees)[:, None])


def _on_voxels(graph: csr_array, points: Floats, grid: int) -> csr_array:
    """The graph of a shape's points, its weights added up over pairs of voxels. [G^3, G^3]"""
    flat = np.ravel_multi_index(voxel_cells(points, grid).T, (grid,) * 3)
    ones = np.ones(len(points))
    membership = csr_array((ones, (np.arange(len(points)), flat)), shape=(len(points), grid**3))
    return csr_array(membership.T @ graph @ membership)


def _largest_piece(graph: csr_array) -> tuple[csr_array, Ints]:
    """The largest connected piece, and the numbers of its voxels."""
    _, labels = connected_components(graph, directed=False)
    filled = np.flatnonzero(labels == np.bincount(labels).argmax())
    return csr_array(graph[filled][:, filled]), filled


def functional_map(vectors: Floats, joint_at_points: Floats) -> Floats:
    """C: vector i of the shape is about sum_j C[i, j] joint_j. [D, J]

    `vectors` [N, D] are the shape's lowest eigenvectors, `joint_at_points` [N, J] is the joint
    basis, read at the shape's points. On one shape these functions are not orthonormal; C is the
    projection onto the orthonormal functions that are nearest to them (Loewdin, 1950). So the
    squared length of a row is the share of the vector that the joint basis holds, and rows are as
    orthogonal as those shares are large. C is exact if a map of the points that keeps distances
    relates the bases.
    """
    functions = joint_at_points / np.maximum(np.linalg.norm(joint_at_points, axis=0), 1e-9)
    values, axes = np.linalg.eigh(functions.T @ functions)
    nearest = functions @ (axes / np.sqrt(np.maximum(values, LEAST_VALUE))) @ axes.T
    maps: Floats = vectors.T @ nearest
    return maps
