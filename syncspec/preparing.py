"""From shapes to what the network takes: eigenpairs, features, voxels, targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor

from syncspec.features import point_features
from syncspec.graph import BasisCache
from syncspec.joint import JointBasis, functional_map, joint_basis, voxel_cells
from syncspec.network import Batch, Design
from syncspec.shapes import Shape

TASKS = ("parts", "keypoints")


@dataclass(frozen=True)
class Prepared:
    """One shape, ready for the network; its batch has B = 1."""

    shape: Shape
    batch: Batch
    target: Tensor  # parts: the label of each point [1, N]; keypoints: a point for each [1, P]


def prepare(shape: Shape, design: Design, cache: BasisCache, task: str = "parts") -> Prepared:
    """Raises ValueError for points that have no basis (`syncspec.graph.eigenbasis`)."""
    cache = replace(cache, weights=design.weights, tied=design.tied)
    basis = cache.get(shape.points, shape.name or "the shape")
    batch = Batch(
        features=_floats(point_features(shape.points, basis)),
        frequencies=_floats(basis.frequencies),
        vectors=_floats(basis.vectors),
        cells=torch.from_numpy(voxel_cells(shape.points, design.grid))[None],
    )
    return Prepared(shape, batch, target_of(shape, task))


def for_keypoints(prepared: Sequence[Prepared]) -> list[Prepared]:
    """The same shapes with keypoints as targets."""
    return [replace(one, target=target_of(one.shape, "keypoints")) for one in prepared]


def target_of(shape: Shape, task: str) -> Tensor:
    """Labels, or the number of the point nearest to each keypoint. [1, N] or [1, P]"""
    if task not in TASKS:
        raise ValueError(f"task is {task!r}; it must be one of {TASKS}")
    if task == "parts":
        return torch.from_numpy(shape.labels)[None]
    if not len(shape.keypoints):
        raise ValueError(f"{shape.name or 'the shape'} has no keypoints")
    return torch.from_numpy(np.asarray(cKDTree(shape.points).query(shape.keypoints)[1]))[None]


def joint_basis_of(prepared: Sequence[Prepared], design: Design) -> JointBasis:
    """Of the training shapes of a category."""
    points = [one.shape.points for one in prepared]
    return joint_basis(points, design.grid, design.num_joint, design.weights, tied=design.tied)


def map_targets(prepared: Sequence[Prepared], joint: JointBasis, design: Design) -> Tensor:
    """The functional maps that pre-training aims at. [S, D, J]"""
    maps = []
    for one in prepared:
        vectors = one.batch.vectors[0, :, : design.num_synchronised].double().numpy()
        maps.append(functional_map(vectors, joint.at(one.shape.points)))
    return torch.from_numpy(np.stack(maps)).float()


def _floats(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array).float()[None]
