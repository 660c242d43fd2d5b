"""The walk on hand-built trees."""

from __future__ import annotations

import pytest
import torch

from engine.speculation.verify import walk
from engine.step.tree import DraftTree
from kernels.ops import Ops

# root(5) -> 6, 7;  6 -> 8;  7 -> 8, 9;  9 -> 5
TOKENS = [5, 6, 7, 8, 8, 9, 5]
PARENTS = [-1, 0, 0, 1, 2, 2, 5]
DEPTHS = [0, 1, 1, 2, 2, 2, 3]


def tree() -> DraftTree:
    return DraftTree(
        tokens=torch.tensor([TOKENS]),
        parents=torch.tensor([PARENTS]),
        depths=torch.tensor([DEPTHS]),
        ancestors=torch.zeros(1, len(TOKENS), dtype=torch.int64),
        sizes=torch.tensor([len(TOKENS)]),
        max_depth=3,
    )


@pytest.mark.parametrize(
    ("drawn", "path", "emitted"),
    [
        ([1, 0, 0, 0, 0, 0, 0], [0], [1]),
        ([6, 1, 0, 0, 0, 0, 0], [0, 1], [6, 1]),
        ([7, 0, 8, 0, 3, 0, 0], [0, 2, 4], [7, 8, 3]),
        ([7, 0, 9, 0, 0, 5, 4], [0, 2, 5, 6], [7, 9, 5, 4]),
        ([8, 0, 0, 0, 0, 0, 0], [0], [8]),  # 8 is a grandchild, not a child
    ],
    ids=["nothing", "one", "second-branch", "to-the-leaf", "grandchild-is-no-child"],
)
def test_walk_follows_drawn_children(
    reference_ops: Ops, drawn: list[int], path: list[int], emitted: list[int]
) -> None:
    result = walk(tree(), torch.tensor([drawn]), reference_ops)
    padded = [-1] * (4 - len(path))
    assert result.path.tolist() == [path + padded]
    assert result.emitted.tolist() == [emitted + padded]
    assert result.num_accepted.tolist() == [len(path) - 1]


def test_a_root_only_tree_emits_exactly_the_drawn_token(reference_ops: Ops) -> None:
    roots = DraftTree.roots(torch.tensor([3, 4]))
    result = walk(roots, torch.tensor([[7], [8]]), reference_ops)
    assert result.emitted.tolist() == [[7], [8]]
    assert result.num_accepted.tolist() == [0, 0]
