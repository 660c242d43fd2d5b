"""Draft trees as tensors, and the result of verification. Plain decoding is a tree of one node."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class DraftTree:
    """One tree per row, parents before children. Node 0 is the root: the newest committed token,
    whose KV is not in the cache yet. Nodes from a row's size on are unused: their parent is -1, and
    their tokens, depths and masks are arbitrary."""

    tokens: Tensor  # [B, N] int64
    parents: Tensor  # [B, N] int64, -1 for the root
    depths: Tensor  # [B, N] int64, root 0
    ancestors: Tensor  # [B, N] int64 bit mask over nodes, own bit included
    sizes: Tensor  # [B] int64
    max_depth: int  # no node lies deeper

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

    def cut(self, sizes: Tensor) -> DraftTree:
        """Keep the first `sizes` [B] nodes of each row."""
        nodes = torch.arange(self.tokens.shape[1], device=sizes.device)
        parents = self.parents.masked_fill(nodes >= sizes[:, None], -1)
        return DraftTree(self.tokens, parents, self.depths, self.ancestors, sizes, self.max_depth)

    def ending_at(self, depths: Tensor) -> DraftTree:
        """No walk goes below these depths [B]. Deeper nodes stay, without a parent, but nothing
        uses what they compute."""
        parents = self.parents.masked_fill(self.depths > depths[:, None], -1)
        return replace(self, parents=parents)

    def with_chains(self, tokens: Tensor, lengths: Tensor) -> DraftTree:
        """Rows with a known draft get it as a chain below their root; the others keep their tree.

        Args:
            tokens: [B, K] of the drafts.
            lengths: [B] of the drafts, 0 without a draft.
        """
        known = torch.cat((self.tokens[:, :1], tokens), dim=1)
        nodes = torch.arange(known.shape[1], device=known.device).expand_as(known)
        up_to_node = torch.full_like(nodes, -1) ^ (torch.full_like(nodes, -2) << nodes)
        chains = DraftTree(known, nodes - 1, nodes, up_to_node, 1 + lengths, tokens.shape[1])
        return chains.cut(1 + lengths).where(lengths > 0, self)

    def where(self, rows: Tensor, other: DraftTree) -> DraftTree:
        """These trees where `rows` [B] bool, those of `other` elsewhere."""
        width = max(self.tokens.shape[1], other.tokens.shape[1])

        def pick(name: str, unused: int) -> Tensor:
            own, theirs = (widened(getattr(tree, name), width, unused) for tree in (self, other))
            return torch.where(rows[:, None], own, theirs)

        return DraftTree(
            tokens=pick("tokens", 0),
            parents=pick("parents", -1),
            depths=pick("depths", 0),
            ancestors=pick("ancestors", 1),
            sizes=torch.where(rows, self.sizes, other.sizes),
            max_depth=max(self.max_depth, other.max_depth),
        )

    def narrowed(self) -> DraftTree:
        """Cut to the width and depth of the nodes in use, which the host reads from the device."""
        width = int(self.sizes.max())
        used = torch.arange(width, device=self.sizes.device) < self.sizes[:, None]
        depths = self.depths[:, :width]
        return DraftTree(
            tokens=self.tokens[:, :width],
            parents=self.parents[:, :width],
            depths=depths,
            ancestors=self.ancestors[:, :width],
            sizes=self.sizes,
            max_depth=int(torch.where(used, depths, 0).max()),
        )


def widened(part: Tensor, width: int, unused: int) -> Tensor:
    """[B, N] -> [B, width], padded with `unused`."""
    missing = width - part.shape[1]
    return part if missing == 0 else torch.nn.functional.pad(part, (0, missing), value=unused)


@dataclass(frozen=True, slots=True)
class VerifyResult:
    """The accepted path of each row and what it emits (accepted tokens, then the bonus token)."""

    path: Tensor  # [B, max_depth + 1] int64 node ids from the root, -1 after the end
    num_accepted: Tensor  # [B] int64
    emitted: Tensor  # [B, max_depth + 1] int64 tokens, -1 after the bonus
