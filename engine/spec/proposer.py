"""The contract by which draft heads enter the engine, and the proposer that drafts nothing."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from engine.runner.forward import ForwardBatch
from engine.spec.tree import DraftTree, VerifyResult


class Proposer(Protocol):
    """Proposes trees and learns what became of them.

    Nothing is assumed about how a tree is made (one forward per level, one for all levels, no
    model at all). Every committed token passes through `extend`, also when trees are cut down to
    the root, so that drafting can resume at any step.
    """

    def extend(self, batch: ForwardBatch, hidden: Tensor, result: VerifyResult | None) -> None:
        """Take in what the target computed: `hidden` [T, H] and, where drawn, the walk."""
        ...

    def propose(self, roots: Tensor) -> DraftTree:
        """Trees for the rows whose newest tokens are `roots` [B]."""
        ...


class RootProposer:
    """Plain decoding: the tree is its root."""

    def extend(self, batch: ForwardBatch, hidden: Tensor, result: VerifyResult | None) -> None:
        """Nothing to learn: a root needs no draft state."""

    def propose(self, roots: Tensor) -> DraftTree:
        return DraftTree.roots(roots)
