"""Functional maps: exact for isometric shapes; the network that predicts them."""

from __future__ import annotations

import pytest

pytest.importorskip("scipy", reason="syncspec needs scipy: pip install .[syncspec]")

import numpy as np
import torch

from syncspec.generator import generate
from syncspec.graph import eigenbasis
from syncspec.joint import functional_map, joint_basis, voxel_cells
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
    np.testing.assert_allclose(joint.vectors.T @ joint.vectors, np.eye(45), atol=1e-8)
    assert joint.voxels.min() >= 0
    assert joint.voxels.max() < 8
    maps = functional_map(eigenbasis(shapes[0], 15).vectors, joint.at(shapes[0]))
    assert maps.shape == (15, 45)
    product = maps @ maps.T
    assert np.abs(product - np.eye(15)).mean() < 0.15


@pytest.mark.parametrize(
    ("shapes", "grid", "count", "named"),
    [([], 8, 5, "there are none"), ([CHAIR], 4, 64, "fill .* voxels")],
)
def test_a_joint_basis_needs_shapes_and_voxels(
    shapes: list[np.ndarray], grid: int, count: int, named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        joint_basis(shapes, grid, count)


def test_voxels_hold_means() -> None:
    vectors = torch.tensor([[[1.0], [3.0], [-2.0]]])
    cells = torch.tensor([[[0, 0, 0], [0, 0, 0], [3, 1, 2]]])
    volumes = voxelised(vectors, cells, 4)
    assert volumes.shape == (1, 1, 2, 4, 4, 4)
    assert volumes[0, 0, :, 0, 0, 0].tolist() == pytest.approx([2 * 3**0.5, 1])
    assert volumes[0, 0, :, 3, 1, 2].tolist() == pytest.approx([-2 * 3**0.5, 1])
    assert float(volumes[0, 0, 1].sum()) == 2


def test_cells_fill_the_grid_along_every_axis() -> None:
    cells = voxel_cells(CHAIR * [1, 0.1, 5], 8)
    assert (cells.min(axis=0).tolist(), cells.max(axis=0).tolist()) == ([0] * 3, [7] * 3)


def test_signs_and_order_of_vectors_are_those_of_the_rows() -> None:
    torch.manual_seed(0)
    network = SpectralTransformer(45, 8, 4)
    vectors = torch.tensor(eigenbasis(CHAIR, 15).vectors).float()[None]
    cells = torch.tensor(voxel_cells(CHAIR, 8))[None]
    maps = network(vectors, cells)
    signs = torch.where(torch.arange(15) % 3 == 0, -1.0, 1.0)
    order = torch.randperm(15)
    assert maps.shape == (1, 15, 45)
    torch.testing.assert_close(network(vectors * signs, cells), maps * signs[:, None])
    torch.testing.assert_close(network(vectors[..., order], cells), maps[:, order])
