"""Counters of verified draft trees."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(slots=True)
class DraftCounts:
    """What became of draft nodes since start."""

    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    accepted_per_position: list[int] = field(default_factory=list)
    steps_by_tree: Counter[str] = field(default_factory=Counter)
    seconds_by_part: dict[str, float] = field(default_factory=dict)
    num_faults: int = 0  # as the proposer counts them
    failed: bool = False

    def add_step(self, tree: str, seconds: Mapping[str, float]) -> None:
        """A step that verified trees of this shape, and how long its parts took."""
        self.steps_by_tree[tree] += 1
        for part, spent in seconds.items():
            self.seconds_by_part[part] = self.seconds_by_part.get(part, 0.0) + spent

    def add_tree(self, num_draft: int, num_accepted: int) -> None:
        """A tree with `num_draft` nodes besides the root, of which a path was accepted."""
        if num_draft == 0:
            return
        self.num_drafts += 1
        self.num_draft_tokens += num_draft
        self.num_accepted_tokens += num_accepted
        missing = num_accepted - len(self.accepted_per_position)
        self.accepted_per_position += [0] * missing
        for depth in range(num_accepted):
            self.accepted_per_position[depth] += 1
