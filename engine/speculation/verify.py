"""Verification of draft trees. The walk follows the drawn tokens down the tree; it is lossless for
every tree, because nodes are fixed tokens (proposals of point mass). The commit moves the KV of
accepted nodes to where plain decoding would have put it."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.kv.storage import KVStorage
from engine.step.tree import DraftTree, VerifyResult
from kernels.ops import Ops


def walk(tree: DraftTree, drawn: Tensor, ops: Ops) -> VerifyResult:
    """Step from the root into the child that equals the token drawn at the current node.

    Args:
        tree: B trees of N nodes.
        drawn: [B, N] the target's token after each node, given that node's own path.

    The token drawn at the last node reached is the bonus token, so every row emits at least one.
    """
    if tree.max_depth == 0:
        root = torch.zeros_like(drawn)
        return VerifyResult(root, root[:, 0], drawn)
    return VerifyResult(*ops.tree_walk(tree.tokens, tree.parents, drawn, tree.max_depth))


def commit(result: VerifyResult, node_slots: Tensor, kv: KVStorage, ops: Ops) -> None:
    """Move the KV of the accepted node at depth d from its own slot to slot d after the root's.

    Args:
        result: the walk over B trees.
        node_slots: [B, N] int64, the slot of every node; node i of a row lies i slots after its
            root, so column d is also where depth d belongs.
    """
    path = result.path[:, 1:]  # [B, max_depth] node ids, -1 after the end
    depths = torch.arange(1, path.shape[1] + 1, device=path.device)
    moved = (path > 0) & (path != depths)
    if path.device.type == "cpu" and not bool(moved.any()):
        return
    # The host does not know which nodes move: for the others, the root's slot moves onto itself.
    root = node_slots[:, :1]
    sources = torch.where(moved, node_slots.gather(1, path.clamp(min=0)), root)
    targets = torch.where(moved, node_slots[:, 1 : path.shape[1] + 1], root)
    ops.kv_move((*kv.keys, *kv.values), sources.flatten(), targets.flatten())
