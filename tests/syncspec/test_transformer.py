"""Functional maps: exact for isometric shapes; the network that predicts them."""

from __future__ import annotations

import pytest

pytest.importorskip("scipy", reason="syncspec needs scipy: pip install .[syncspec]")

import numpy as np
import torch

from syncspec.generator import generate
from syncspec.graph import WEIGHTS, eigenbasis
from syncspec.joint import functional_map, joint_basis, voxel_cells
from syncspec.training import turned
from syncspec.transformer import SpectralTransformer, far_from_orthonormal, voxelised

CHAIR = generate("chair", 400, 0).points


def test_the_map_between_isometric_shapes_is_exact() -> None:
    """A copy in another order and place has the same vectors, up to their signs."""
    order = np.random.default_rng(0).permutation(len(CHAIR))
    own, other = eigenbasis(CHAIR, 15), eigenbasis(CHAIR[order] * 2 + 1, 45)
    back = np.argsort(order)
    found = functional_map(own.vectors, other.vectors[back])
    np.testing.assert_allclose(np.abs(found), np.eye(15, 45), atol=1e-4)
    assert float(far_from_orthonormal(torch.tensor(found)[None].float())) < 1e-8
    read = found @ other.vectors[back].T  # vectors of the shape, by those of its copy
    np.testing.assert_allclose(read, own.vectors.T, atol=1e-4)


def test_a_joint_basis_is_orthonormal_and_its_maps_nearly_so() -> None:
    shapes = [generate("table", 800, seed).points for seed in range(4)]
    joint = joint_basis(shapes, 8, 45)
    products = joint.functions.T @ (joint.degrees[:, None] * joint.functions)
    np.testing.assert_allclose(products, np.eye(45), atol=1e-8)
    np.testing.assert_allclose(joint.functions[:, 0], joint.functions[0, 0], rtol=1e-6)
    assert joint.voxels.min() >= 0
    assert joint.voxels.max() < 8
    maps = functional_map(eigenbasis(shapes[0], 15).vectors, joint.at(shapes[0]))
    assert maps.shape == (15, 45)
    product = maps @ maps.T
    assert np.abs(product - np.eye(15)).mean() < 0.03
    assert np.linalg.eigvalsh(product).max() < 1 + 1e-8  # a projection makes nothing longer
    assert np.diag(product).min() > 0.6
    assert maps[0].argmax() == 0  # the lowest of both are nearly constant


def test_a_joint_basis_holds_the_low_eigenvectors_of_a_shape_it_has_not_seen() -> None:
    """Those of 1/d^2 are rough: half of their squares lie outside any smooth functions."""
    shapes = [generate("table", 1000, seed).points for seed in range(6)]
    held = {}
    for weights in WEIGHTS:
        at_points = joint_basis(shapes[:5], 12, 45, weights).at(shapes[5])
        smooth, _ = np.linalg.qr(at_points)
        vectors = eigenbasis(shapes[5], 5, weights=weights).vectors
        held[weights] = float(np.square(smooth.T @ vectors).sum(axis=0).min())
    assert held["gaussian"] > 0.8
    assert held["inverse-square"] < 0.6


@pytest.mark.parametrize(
    ("shapes", "grid", "count", "named"),
    [([], 8, 5, "there are none"), ([CHAIR], 4, 64, "fill .* voxels")],
)
def test_a_joint_basis_needs_shapes_and_voxels(
    shapes: list[np.ndarray], grid: int, count: int, named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        joint_basis(shapes, grid, count)


def test_voxels_hold_sums_and_counts() -> None:
    vectors = torch.tensor([[[1.0], [3.0], [-2.0]]])
    cells = torch.tensor([[[0, 0, 0], [0, 0, 0], [3, 1, 2]]])
    volumes = voxelised(vectors, cells, 4)
    assert volumes.shape == (1, 1, 2, 4, 4, 4)
    average = 3 / 2  # points in a filled voxel
    assert volumes[0, 0, :, 0, 0, 0].tolist() == pytest.approx([4 * 3**0.5 / average, 2 / average])
    assert volumes[0, 0, :, 3, 1, 2].tolist() == pytest.approx([-2 * 3**0.5 / average, 1 / average])
    assert float(volumes[0, 0, 1].sum()) == pytest.approx(2)


def test_cells_fill_the_grid_along_every_axis() -> None:
    cells = voxel_cells(CHAIR * [1, 0.1, 5], 8)
    assert (cells.min(axis=0).tolist(), cells.max(axis=0).tolist()) == ([0] * 3, [7] * 3)


def test_signs_and_order_of_vectors_are_those_of_the_rows() -> None:
    torch.manual_seed(0)
    network = SpectralTransformer(45, 8, 4, 32)
    vectors = torch.tensor(eigenbasis(CHAIR, 15).vectors).float()[None]
    cells = torch.tensor(voxel_cells(CHAIR, 8))[None]
    maps = network(vectors, cells)
    signs = torch.where(torch.arange(15) % 3 == 0, -1.0, 1.0)
    order = torch.randperm(15)
    assert maps.shape == (1, 15, 45)
    torch.testing.assert_close(network(vectors * signs, cells), maps * signs[:, None])
    torch.testing.assert_close(network(vectors[..., order], cells), maps[:, order])


def test_turned_vectors_have_the_maps_of_a_projection() -> None:
    vectors = eigenbasis(CHAIR, 6).vectors
    joint = np.linalg.qr(np.random.default_rng(0).normal(size=(400, 9)))[0]
    maps = torch.tensor(functional_map(vectors, joint))[None]
    other, found = turned(torch.tensor(vectors)[None], maps, torch.Generator().manual_seed(0))
    assert not torch.allclose(found, maps, atol=0.01)
    torch.testing.assert_close(other[0].T @ other[0], torch.eye(6).double())
    np.testing.assert_allclose(found[0].numpy(), functional_map(other[0].numpy(), joint), atol=1e-8)
