"""Which tokens a draft head guesses after the nodes of a level, composed of other operations.

The target will draw argmax(log p / T + noise) among the tokens that its filters keep, and the noise
is known. So the best guess is argmax(log q / T + noise), over the whole draft vocabulary. This
never changes the output, and it raises acceptance at temperature 1 close to that of greedy
decoding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.sampling.settings import DrawSettings, Scores


@dataclass(frozen=True, slots=True)
class NodeDraws:
    """How the target will draw the tokens after R nodes of B rows: after node `begin` + r of all,
    of which each row has `per_row`."""

    rows: DrawSettings  # of B rows; `positions` are those of the roots, and `allowed` is None
    per_row: int
    ahead: int  # from a root's position to that of the token after its row's first node
    step: int = 0  # and how much farther it is for each further node of the row
    begin: int = 0

    def settings(self, num_nodes: int) -> DrawSettings:
        """The settings of R nodes."""
        rows = self.rows
        node = torch.arange(self.begin, self.begin + num_nodes, device=rows.seeds.device)
        row, place = node // self.per_row, node % self.per_row

        def part(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[row]

        return replace(
            rows,
            temperature=rows.temperature[row],
            seeds=rows.seeds[row],
            positions=rows.positions[row] + self.ahead + self.step * place,
            top_k=part(rows.top_k),
            top_p=part(rows.top_p),
            min_p=part(rows.min_p),
        )


@dataclass(frozen=True, slots=True)
class Ranked:
    """The best tokens after R nodes, the best first; the lower draft id among equals."""

    tokens: Tensor  # [R, count] int64 ids of the target
    scores: Tensor | None  # [R, count] float32 log-probability that each is drawn, given the noise


@dataclass(frozen=True, slots=True)
class ComposedRanking:
    """The operation `rank_drafts`, composed of a backend's operations of these names."""

    add_noise: Callable[[Tensor, DrawSettings, Tensor | None], Tensor]
    argmax: Callable[[Tensor], Tensor]
    score: Callable[[Tensor, Tensor, int], Scores]

    def __call__(
        self,
        logits: Tensor,
        draws: NodeDraws,
        target_ids: Tensor | None,
        count: int,
        scored: bool,
    ) -> Ranked:
        """logits [R, V] of a draft head -> the `count` best tokens after each node, fewer if there
        are no more. `target_ids`: [V] the target's id of each draft token; None if they are equal.
        """
        ranked = logits.float()
        if draws.rows.any_sampled:
            ranked = self.add_noise(ranked, draws.settings(len(logits)), target_ids)
        if count == 1 and not scored:
            ids, scores = self.argmax(ranked)[:, None], None
        else:
            # `score` wants a token; its probability is not used
            anyone = torch.zeros(len(ranked), dtype=torch.int64, device=ranked.device)
            best = self.score(ranked, anyone, min(count, ranked.shape[1]))
            ids, scores = best.top_ids, best.top if scored else None
        return Ranked(ids if target_ids is None else target_ids[ids], scores)
