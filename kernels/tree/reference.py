"""Draft trees in plain torch. Shapes follow from arguments, so nothing waits for the device.

Legend: B rows, C scored candidates, N nodes.
In every tie the lower index wins: a parent before its children, and the lower token id.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _best(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The highest of the last dimension, the lower index first among equals, and where they are."""
    ordered, places = values.sort(dim=-1, descending=True, stable=True)
    return ordered[..., :count], places[..., :count]


def select(
    tokens: Tensor,
    parents: Tensor,
    scores: Tensor,
    root_tokens: Tensor,
    limits: Tensor,
    num_nodes: int,
) -> tuple[Tensor, Tensor]:
    """The tree of the root and the best candidates of each row.

    Args:
        tokens: [B, C] int64.
        parents: [B, C] int64 candidate above each, -1 for the root; parents come first.
        scores: [B, C] float32 cumulative, no child's above its parent's, no NaN.
        root_tokens: [B] int64.
        limits: [B] int64 nodes of each tree: always the root, and the best
            min(limits[b], num_nodes) - 1 candidates.
        num_nodes: at most C + 1.

    Returns:
        tokens and parents [B, num_nodes] int64, the root first, parents before children; -1 for
        unused nodes, which come last.
    """
    C = tokens.shape[1]
    best = _best(scores, num_nodes - 1)[1]  # [B, num_nodes - 1]
    rank = torch.arange(num_nodes - 1, device=best.device)
    kept = torch.where(rank < limits[:, None] - 1, best, C)
    chosen = kept.sort(dim=1).values  # C: unused
    used, chosen = chosen < C, chosen.clamp(max=C - 1)
    nodes = _nodes_of(parents.gather(1, chosen), chosen)
    root = torch.full_like(root_tokens, -1)[:, None]
    drafted = tokens.gather(1, chosen)
    return (
        torch.cat((root_tokens[:, None], torch.where(used, drafted, -1)), dim=1),
        torch.cat((root, torch.where(used, nodes, -1)), dim=1),
    )


def _nodes_of(candidates: Tensor, chosen: Tensor) -> Tensor:
    """The nodes that candidates are in the tree of the root (candidate -1) and the `chosen`, which
    are in order: 1 + the number of chosen ones before."""
    nodes = 1 + (chosen[:, None, :] < candidates[:, :, None]).sum(dim=2)
    return torch.where(candidates < 0, 0, nodes)


def ancestors(parents: Tensor) -> tuple[Tensor, Tensor]:
    """The nodes on the path to each node, in trees of at most 64 nodes.

    Args:
        parents: [B, N] int64, -1 for the root and for unused nodes.

    Returns:
        masks: [B, N] int64, bit i for node i, the node's own included.
        depths: [B, N] int64, 0 for the root and for unused nodes.
    """
    nodes = torch.arange(parents.shape[1], device=parents.device)
    masks, depths = torch.ones_like(parents) << nodes, (parents >= 0).long()
    above = torch.where(parents < 0, nodes, parents)
    for _ in range((len(nodes) - 1).bit_length()):  # each turn doubles the reach of the masks
        depths = depths + depths.gather(1, above)
        masks = masks | masks.gather(1, above)
        above = above.gather(1, above)
    return masks, depths


def walk(
    tokens: Tensor, parents: Tensor, drawn: Tensor, max_depth: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Follow the drawn tokens down each tree: from each node to the child that equals its draw.

    Args:
        tokens, parents: [B, N] int64 of the nodes; parent -1 for the root and unused nodes.
        drawn: [B, N] int64 the target's token after each node.
        max_depth: largest depth of any node.

    Returns:
        path: [B, max_depth + 1] int64 nodes from the root, -1 after the end.
        num_accepted: [B] int64.
        emitted: [B, max_depth + 1] int64 tokens drawn along the path, -1 after the end.
    """
    node = torch.zeros_like(drawn[:, 0])
    alive = torch.ones_like(node, dtype=torch.bool)
    path, emitted = [node], [drawn[:, 0]]
    for _ in range(max_depth):
        is_next = (parents == node[:, None]) & (tokens == emitted[-1][:, None])  # [B, N]
        alive = alive & is_next.any(dim=1)
        node = torch.where(alive, is_next.int().argmax(dim=1), node)
        path.append(torch.where(alive, node, -1))
        emitted.append(torch.where(alive, drawn.gather(1, node[:, None])[:, 0], -1))
    paths = torch.stack(path, dim=1)
    return paths, (paths >= 0).sum(dim=1) - 1, torch.stack(emitted, dim=1)
