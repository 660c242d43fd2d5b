"""A proposer for padded steps that knows the texts in advance."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from drafter.static_levels import StaticLevels
from engine.speculation.proposer import Drafted, DraftLimits, RootProposer, Roots
from engine.step.shape import StaticShape, TreeShape
from engine.step.tree import DraftTree


@dataclass
class KnowingProposer(RootProposer):
    """Usually drafts the true next tokens: paths are long and end anywhere. Rows are identified by
    their seeds."""

    truth: torch.Tensor  # [seeds, positions]
    vocab_size: int = 131

    def draft(self, roots: Roots, shape: TreeShape, limits: DraftLimits) -> Drafted:
        assert isinstance(shape, StaticShape)
        assert not limits.exact
        plan = StaticLevels(roots.tokens.device).of(shape)
        depths = plan.depths.expand(len(roots.tokens), -1)
        positions = roots.positions[:, None] + depths
        nodes = torch.arange(shape.num_nodes).expand_as(depths)
        true = self.truth[roots.seeds[:, None], positions]
        wrong = (positions * 5 + nodes * 3 + roots.seeds[:, None]) % 7 == 0
        tokens = torch.where(wrong, (true + 1 + nodes) % self.vocab_size, true)
        tokens[:, 0] = roots.tokens
        tree = DraftTree(
            tokens=tokens,
            parents=plan.parents.expand_as(tokens),
            depths=depths,
            ancestors=plan.masks.expand_as(tokens),
            sizes=roots.max_nodes,
            max_depth=shape.max_depth,
        )
        return Drafted(tree.cut(roots.max_nodes), torch.zeros_like(roots.tokens, dtype=torch.bool))
