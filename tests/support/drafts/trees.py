"""Draft trees for tests."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.step.shape import StaticShape, signed
from engine.step.tree import DraftTree


def roots(count: int) -> DraftTree:
    """Plain decoding of `count` rows."""
    return DraftTree.roots(torch.zeros(count, dtype=torch.int64))


def filled(shape: StaticShape, tokens: torch.Tensor, sizes: torch.Tensor) -> DraftTree:
    """The same shape for all rows, filled with `tokens` [B, N]; row b keeps `sizes[b]` nodes."""

    def spread(values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values).expand_as(tokens)

    masks = [signed(mask) for mask in shape.ancestors]
    parts = spread(shape.parents), spread(shape.depths), spread(masks)
    return DraftTree(tokens, *parts, sizes, shape.max_depth).cut(sizes)
