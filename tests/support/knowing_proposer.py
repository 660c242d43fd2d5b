"""A proposer for decode rounds that knows the texts to come."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from drafter.static_levels import levels_of
from engine.kv.slots import Scratch
from engine.speculation.proposer import Ints, RootProposer, Roots
from engine.step.shape import StaticShape, TreeShape
from engine.step.tree import DraftTree


@dataclass
class KnowingProposer(RootProposer):
    """Plants the tokens to come, most of the time: paths are long and end anywhere. Rows are known
    by their seeds."""

    truth: torch.Tensor  # [seeds, positions]
    vocab_size: int = 131
    lookahead = 0

    def knows(self, lines: Ints, positions: Ints) -> NDArray[np.bool_]:
        return np.ones(len(lines), dtype=np.bool_)

    def draft(
        self, roots: Roots, shape: TreeShape, max_context: int, any_sampled: bool, scratch: Scratch
    ) -> tuple[DraftTree, torch.Tensor]:
        assert isinstance(shape, StaticShape)
        plan = levels_of(shape, roots.tokens.device)
        depths = plan.depths.expand(len(roots.tokens), -1)
        positions = roots.positions[:, None] + depths
        nodes = torch.arange(shape.num_nodes).expand_as(depths)
        true = self.truth[roots.seeds[:, None], positions]
        wrong = (positions * 5 + nodes * 3 + roots.seeds[:, None]) % 7 == 0
        tokens = torch.where(wrong, (true + 1 + nodes) % self.vocab_size, true)
        tokens[:, 0] = roots.tokens
        behind = nodes >= roots.max_nodes[:, None]
        tree = DraftTree(
            tokens=tokens,
            parents=plan.parents.expand_as(tokens).masked_fill(behind, -1),
            depths=depths,
            ancestors=plan.masks.expand_as(tokens),
            sizes=roots.max_nodes,
            max_depth=shape.max_depth,
        )
        return tree, torch.ones_like(roots.tokens, dtype=torch.bool)
