"""Rank 0's draft trees for everybody, so that a last bit in which ranks differ splits nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.step.group import TPGroup
from engine.step.shape import TreeShape
from engine.step.tree import DraftTree
from engine.transfer import download, upload


def share_tree(
    tree: DraftTree, shape: TreeShape, group: TPGroup, device: torch.device
) -> DraftTree:
    """The trees of rank 0, which are of `shape` at most, in place of this rank's own; both on the
    host. `device`: of the group's collectives."""
    if group.size == 1:
        return tree
    packed = _packed(tree, shape.num_nodes)  # ranks may have grown trees of different widths
    shared = _unpacked(download(group.from_first(upload(packed, device))), 0)
    return shared.cut(shared.sizes)


def share_round_tree(tree: DraftTree, sound: Tensor, group: TPGroup) -> tuple[DraftTree, Tensor]:
    """The same inside a round, where all ranks' trees have one width: the host does not wait.
    `sound` [B] bool comes from rank 0, too."""
    if group.size == 1:
        return tree, sound
    packed = torch.cat([_packed(tree, tree.tokens.shape[1]), sound[:, None].long()], dim=1)
    shared = group.from_first(packed)
    return _unpacked(shared[:, :-1], tree.max_depth), shared[:, -1] > 0


def _packed(tree: DraftTree, width: int) -> Tensor:
    """[B, 1 + 4 width]: sizes, then what is known of each node."""
    parts = (tree.tokens, tree.parents, tree.depths, tree.ancestors)
    return torch.cat([tree.sizes[:, None], *(_widened(part, width) for part in parts)], dim=1)


def _unpacked(packed: Tensor, max_depth: int) -> DraftTree:
    nodes = packed[:, 1:].reshape(len(packed), 4, -1)
    return DraftTree(nodes[:, 0], nodes[:, 1], nodes[:, 2], nodes[:, 3], packed[:, 0], max_depth)


def _widened(part: Tensor, width: int) -> Tensor:
    """[B, N] -> [B, width]; what is added lies behind every tree."""
    own = part.new_zeros(len(part), width)
    own[:, : part.shape[1]] = part
    return own
