"""How many tokens a round emits, from one number: how well a draft head agrees with its target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.step.shape import DynamicShape, TreeShape

# Where the likeliest draft is not the drawn token, how often the second, third, ... is it. Of the
# shipped head on MT-Bench; the planner of trees starts from the same numbers.
SIBLINGS = (0.333, 0.178, 0.111, 0.089, 0.067, 0.044, 0.044)
CHAIN = 3  # the literature states acceptance lengths of a chain of three drafts


@dataclass(frozen=True, slots=True)
class Acceptance:
    """The chance that an accepted node's likeliest child is the drawn token; alike at any depth."""

    first: float

    @classmethod
    def of_chain(cls, mean_tokens: float) -> Acceptance:
        """From the mean tokens of a round with a chain of three drafts, the bonus token included.

        Raises:
            ValueError: not from 1 to 4.
        """
        if not 1 <= mean_tokens <= CHAIN + 1:
            raise ValueError(
                f"acceptance {mean_tokens:g}: give the mean tokens of a round with a chain of "
                f"{CHAIN} drafts, from 1 to {CHAIN + 1}"
            )
        low, high = 0.0, 1.0
        for _ in range(50):
            middle = (low + high) / 2
            tokens = sum(middle**depth for depth in range(CHAIN + 1))
            low, high = (middle, high) if tokens < mean_tokens else (low, middle)
        return cls(high)

    def chance(self, rank: int) -> float:
        """That an accepted node's child number `rank` (0: the likeliest) is the drawn token."""
        if rank == 0:
            return self.first
        share = SIBLINGS[rank - 1] if rank <= len(SIBLINGS) else 0.0
        return min(self.first, (1 - self.first) * share)

    def tokens(self, shape: TreeShape) -> float:
        """Mean tokens of a round, the bonus token included. A dynamic tree counts as the best
        static one of its size, depth and width; it may do better, since it sees the text."""
        if isinstance(shape, DynamicShape):
            return sum(self._likeliest(shape))
        return sum(self._reached(shape.parents))

    def _reached(self, parents: Sequence[int]) -> list[float]:
        """The chance that each node is accepted."""
        reached: list[float] = []
        children: dict[int, int] = {}
        for parent in parents:
            if parent < 0:
                reached.append(1.0)
                continue
            rank = children.get(parent, 0)
            children[parent] = rank + 1
            reached.append(reached[parent] * self.chance(rank))
        return reached

    def _likeliest(self, shape: DynamicShape) -> list[float]:
        level, found = [1.0], [1.0]
        for _ in range(shape.max_depth):
            chances = [self.chance(rank) for rank in range(shape.top_k)]
            grown = sorted((node * chance for node in level for chance in chances), reverse=True)
            found += grown[: shape.top_k**2]
            level = grown[: shape.top_k]
        return sorted(found, reverse=True)[: shape.num_nodes]
