"""The walk: follow the drawn tokens down the tree. Lossless for any proposal of point masses."""

from __future__ import annotations

from torch import Tensor

from engine.step.tree import DraftTree, VerifyResult
from kernels.ops import Ops


def walk(tree: DraftTree, drawn: Tensor, ops: Ops) -> VerifyResult:
    """Step from the root into the child that equals the token drawn at the current node.

    Args:
        tree: B trees of N nodes.
        drawn: [B, N] the target's token after each node, given that node's own path.

    The token drawn at the last node reached is the bonus token, so every row emits at least one.
    """
    return VerifyResult(*ops.tree_walk(tree.tokens, tree.parents, drawn, tree.max_depth))
