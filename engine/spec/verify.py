"""The walk: follow the drawn tokens down the tree. Lossless for any proposal of point masses."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.spec.tree import DraftTree, VerifyResult


def walk(tree: DraftTree, drawn: Tensor) -> VerifyResult:
    """Step from the root into the child that equals the token drawn at the current node.

    Args:
        tree: B trees of N nodes.
        drawn: [B, N] the target's token after each node, given that node's own path.

    The token drawn at the last node reached is the bonus token, so every row emits at least one.
    """
    num_rows = drawn.shape[0]
    rows = torch.arange(num_rows, device=drawn.device)
    node = torch.zeros(num_rows, dtype=torch.int64, device=drawn.device)
    alive = torch.ones(num_rows, dtype=torch.bool, device=drawn.device)
    path, emitted = [node], [drawn[rows, node]]
    for _ in range(tree.max_depth):
        is_next = (tree.parents == node[:, None]) & (tree.tokens == emitted[-1][:, None])  # [B, N]
        alive = alive & is_next.any(dim=1)
        node = torch.where(alive, is_next.int().argmax(dim=1), node)
        path.append(torch.where(alive, node, -1))
        emitted.append(torch.where(alive, drawn[rows, node], -1))
    paths = torch.stack(path, dim=1)  # [B, max_depth + 1]
    return VerifyResult(
        path=paths,
        num_accepted=(paths >= 0).sum(dim=1) - 1,
        emitted=torch.stack(emitted, dim=1),
    )
