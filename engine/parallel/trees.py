"""Rank 0's draft trees for everybody, so that a last bit in which ranks differ splits nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.parallel.group import TPGroup
from engine.spec.shape import TreeShape
from engine.spec.tree import DraftTree
from engine.transfer import download, upload


def share_tree(
    tree: DraftTree, shape: TreeShape, group: TPGroup, device: torch.device
) -> DraftTree:
    """The trees of rank 0, which are of `shape` at most, in place of this rank's own; both on the
    host. `device`: of the group's collectives."""
    if group.size == 1:
        return tree
    width = shape.num_nodes  # ranks may have grown trees of different widths
    parts = (tree.tokens, tree.parents, tree.depths, tree.ancestors)
    packed = torch.cat([tree.sizes[:, None], *(_widened(part, width) for part in parts)], dim=1)
    shared = download(group.from_first(upload(packed, device)))
    sizes = shared[:, 0]
    nodes = shared[:, 1:].reshape(len(shared), len(parts), width)
    return DraftTree(nodes[:, 0], nodes[:, 1], nodes[:, 2], nodes[:, 3], sizes, 0).cut(sizes)


def _widened(part: Tensor, width: int) -> Tensor:
    """[B, N] -> [B, width]; what is added lies behind every tree."""
    own = part.new_zeros(len(part), width)
    own[:, : part.shape[1]] = part
    return own
