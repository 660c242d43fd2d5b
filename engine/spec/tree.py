"""Draft trees and what verifying them yields. Plain decoding is a tree of one node."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_NODES = 64  # one 64-bit ancestor mask per node


@dataclass(frozen=True, slots=True)
class DraftTree:
    """One tree per row, parents before children. Node 0 is the root: the newest committed token,
    whose KV is not in the cache yet. Unused nodes of a smaller tree have parent -1 and token -1."""

    tokens: Tensor  # [B, N] int64
    parents: Tensor  # [B, N] int64, -1 for the root
    depths: Tensor  # [B, N] int64, root 0
    ancestors: Tensor  # [B, N] int64 bit mask over nodes, own bit included
    sizes: Tensor  # [B] int64
    max_depth: int

    @classmethod
    def roots(cls, tokens: Tensor) -> DraftTree:
        """Trees of the root only, from the newest token [B] of each row."""
        column = tokens.unsqueeze(1)  # [B, 1]
        return cls(
            tokens=column,
            parents=torch.full_like(column, -1),
            depths=torch.zeros_like(column),
            ancestors=torch.ones_like(column),
            sizes=torch.ones_like(tokens),
            max_depth=0,
        )


@dataclass(frozen=True, slots=True)
class VerifyResult:
    """The accepted path of each row and what it emits (accepted tokens, then the bonus token)."""

    path: Tensor  # [B, max_depth + 1] int64 node ids from the root, -1 behind the end
    num_accepted: Tensor  # [B] int64
    emitted: Tensor  # [B, max_depth + 1] int64 tokens, -1 behind the bonus
