"""The spectral transformer: from a shape's lowest eigenvectors to its functional map."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def voxelised(vectors: Tensor, cells: Tensor, grid: int) -> Tensor:
    """Sums of eigenvectors over voxels, and numbers of points.

    [B, N, D], [B, N, 3] -> [B, D, 2, G, G, G]: channel 0 is the sum of sqrt(N) times the vector,
    channel 1 the number of points, both over the number in a filled voxel on average. A product
    with a function that is constant on voxels is linear in channel 0.
    """
    batch, num_points, count = vectors.shape
    flat = (cells[..., 0] * grid + cells[..., 1]) * grid + cells[..., 2]  # [B, N]
    index = flat[..., None].expand(-1, -1, count)
    shape = (batch, grid**3, count)
    empty = vectors.new_zeros(shape)
    sums = empty.scatter_add(1, index, vectors)
    held = empty.scatter_add(1, index, torch.ones_like(vectors))
    average = num_points / (held > 0).sum(dim=1, keepdim=True)
    volumes = torch.stack([sums * num_points**0.5, held], dim=2)  # [B, G^3, 2, D]
    volumes = volumes / average[:, :, None]
    return volumes.permute(0, 3, 2, 1).reshape(batch, count, 2, grid, grid, grid)


class SpectralTransformer(nn.Module):
    """A small 3D CNN that gives each eigenvector its row of the functional map C.

    It sees one eigenvector at a time, so that another order of eigenvectors gives the same rows in
    that order; and what it gives for a vector is the odd part of a network, so that the opposite
    vector gets the opposite row. Section 4.3 of arXiv:1612.00606. A row is nearly linear in its
    vector: means over 2 x 2 x 2 voxels keep that, where the published maxima do not, and `width`,
    the channels before the last layer, must be well above the length of a row.
    """

    def __init__(self, num_joint: int, grid: int, channels: int, width: int) -> None:
        super().__init__()
        self.grid = grid
        side = grid // 4
        self.body = nn.Sequential(
            nn.Conv3d(2, channels, 3, padding=1),
            nn.BatchNorm3d(channels),
            nn.ReLU(),
            nn.AvgPool3d(2),
            nn.Conv3d(channels, 2 * channels, 3, padding=1),
            nn.BatchNorm3d(2 * channels),
            nn.ReLU(),
            nn.AvgPool3d(2),
            nn.Conv3d(2 * channels, width, side),
            nn.BatchNorm3d(width),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(width, num_joint),
        )

    def forward(self, vectors: Tensor, cells: Tensor) -> Tensor:
        """[B, N, D], voxels [B, N, 3] -> C [B, D, J]"""
        volumes = voxelised(vectors, cells, self.grid)
        batch, count = volumes.shape[:2]
        volumes = volumes.flatten(0, 1)
        opposite = volumes * volumes.new_tensor([-1.0, 1.0])[:, None, None, None]
        # Together, so that batch normalisation treats both alike.
        rows, negated = self.body(torch.cat([volumes, opposite])).chunk(2)
        maps: Tensor = (rows - negated) / 2
        return maps.view(batch, count, -1)


def far_from_orthonormal(functional_maps: Tensor) -> Tensor:
    """||C C^T - I||^2 as a mean over entries. [B, D, J] -> []"""
    product = functional_maps @ functional_maps.transpose(1, 2)
    return (product - torch.eye(product.shape[-1], device=product.device)).square().mean()
