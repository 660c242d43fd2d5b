"""Draft trees as tensors, and what verifying them yields. Plain decoding is a tree of one node."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.step.shape import StaticShape, chain, signed


@dataclass(frozen=True, slots=True)
class DraftTree:
    """One tree per row, parents before children. Node 0 is the root: the newest committed token,
    whose KV is not in the cache yet. Nodes behind a row's size have parent -1 and token -1."""

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

    @classmethod
    def chains(cls, roots: Tensor, drafts: Sequence[Sequence[int]]) -> DraftTree:
        """Below each root [B] a chain of the tokens in `drafts`."""
        width = max(map(len, drafts))
        padded = [[*draft, *[-1] * (width - len(draft))] for draft in drafts]
        below = torch.tensor(padded, dtype=roots.dtype, device=roots.device)
        sizes = torch.tensor([1 + len(draft) for draft in drafts], device=roots.device)
        return cls.of_shape(chain(width), torch.cat((roots[:, None], below), dim=1), sizes)

    @classmethod
    def of_shape(cls, shape: StaticShape, tokens: Tensor, sizes: Tensor) -> DraftTree:
        """The same shape for all rows, filled with `tokens` [B, N]. Row b keeps its first
        `sizes[b]` nodes, which are a tree again."""
        masks = [signed(mask) for mask in shape.ancestors]

        def spread(values: Sequence[int]) -> Tensor:
            return torch.tensor(values, device=tokens.device).expand_as(tokens)

        return cls(
            tokens, spread(shape.parents), spread(shape.depths), spread(masks), sizes, 0
        ).cut(sizes)

    def with_rows(self, rows: Tensor, trees: DraftTree) -> DraftTree:
        """These trees, with those of `rows` [B'] replaced."""
        width = max(self.tokens.shape[1], trees.tokens.shape[1])

        def put(own: Tensor, new: Tensor, unused: int) -> Tensor:
            out = own.new_full((len(own), width), unused)
            out[:, : own.shape[1]] = own
            out[rows] = unused
            out[rows, : new.shape[1]] = new
            return out

        return DraftTree(
            tokens=put(self.tokens, trees.tokens, -1),
            parents=put(self.parents, trees.parents, -1),
            depths=put(self.depths, trees.depths, 0),
            ancestors=put(self.ancestors, trees.ancestors, 0),
            sizes=self.sizes.index_put((rows,), trees.sizes),
            max_depth=max(self.max_depth, trees.max_depth),
        )

    def cut(self, sizes: Tensor) -> DraftTree:
        """Keep the first `sizes` [B] nodes of each row."""
        nodes = torch.arange(self.tokens.shape[1], device=sizes.device)
        behind = nodes >= sizes[:, None]  # [B, N]
        depths = self.depths.masked_fill(behind, 0)
        width = int(sizes.max())
        return DraftTree(
            tokens=self.tokens.masked_fill(behind, -1)[:, :width],
            parents=self.parents.masked_fill(behind, -1)[:, :width],
            depths=depths[:, :width],
            ancestors=self.ancestors[:, :width],
            sizes=sizes,
            max_depth=int(depths.max()),
        )


@dataclass(frozen=True, slots=True)
class VerifyResult:
    """The accepted path of each row and what it emits (accepted tokens, then the bonus token)."""

    path: Tensor  # [B, max_depth + 1] int64 node ids from the root, -1 behind the end
    num_accepted: Tensor  # [B] int64
    emitted: Tensor  # [B, max_depth + 1] int64 tokens, -1 behind the bonus
