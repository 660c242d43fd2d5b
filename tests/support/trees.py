"""Draft trees for tests."""

from __future__ import annotations

import torch

from engine.step.tree import DraftTree


def roots(count: int) -> DraftTree:
    """Plain decoding of `count` rows."""
    return DraftTree.roots(torch.zeros(count, dtype=torch.int64))
