"""Sampling spread over ranks: every rank gets the whole logits of its share of the rows, no rank
those of all."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.messages import TokenLogprob
from engine.sampling.sampler import Sampler, TokenScores
from engine.sampling.share import share_of
from engine.step.group import TPGroup
from kernels.sampling.pipeline_reference import DrawSettings


@dataclass(frozen=True, slots=True)
class SpreadLogits:
    """Logits [R, V] of which this rank has the rows `first` .. `first + len(own) - 1`."""

    own: Tensor  # [r, V] float32
    first: int
    num_rows: int  # R
    group: TPGroup

    @classmethod
    def of(cls, local: Tensor, vocab_size: int, group: TPGroup) -> SpreadLogits:
        """From this rank's slice [R, V / ranks] of all rows; slices may be padded at the end."""
        num_rows = len(local)
        if group.size == 1:
            return cls(local, 0, num_rows, group)
        counts = row_counts(num_rows, group.size)
        own = group.to_owners(local, counts)[:, :vocab_size]
        return cls(own.contiguous(), sum(counts[: group.rank]), num_rows, group)

    def draw(self, sampler: Sampler, settings: DrawSettings) -> Tensor:
        """One token per row, [R] int64, the same on every rank; `settings` of all rows."""
        if self.group.size == 1:
            return sampler.draw(self.own, settings)
        drawn = torch.zeros(
            row_counts(self.num_rows, self.group.size)[0],
            dtype=torch.int64,
            device=self.own.device,
        )
        if len(self.own):
            mine = share_of(settings, self.first, self.first + len(self.own))
            drawn[: len(self.own)] = sampler.draw(self.own, mine)
        return self.group.stack(drawn).flatten()[: self.num_rows]

    def logprobs(
        self, sampler: Sampler, at: Tensor, tokens: Tensor, num_top: int
    ) -> list[TokenLogprob]:
        """Log-probabilities of `tokens` [F], token f under row at[f], see `Sampler.logprobs`."""
        if self.group.size == 1:
            return sampler.logprobs(self.own[at], tokens, num_top)
        mine = ((at >= self.first) & (at < self.first + len(self.own))).nonzero()[:, 0]
        chosen = self.own.new_zeros(len(at))
        ids = torch.zeros(len(at), num_top, dtype=torch.int64, device=self.own.device)
        values = self.own.new_zeros(len(at), num_top)
        if len(mine):
            scores = sampler.scores(self.own[at[mine] - self.first], tokens[mine], num_top)
            chosen[mine], ids[mine], values[mine] = scores.chosen, scores.top_ids, scores.top
        total = self.group.all_reduce  # each entry is somebody's, and zero everywhere else
        return TokenScores(total(chosen), total(ids), total(values)).entries(tokens)


def row_counts(num_rows: int, size: int) -> list[int]:
    """How many of the rows each of `size` ranks samples: equal shares, the last ones may get less
    or nothing."""
    share = -(-num_rows // size)
    return [max(0, min(share, num_rows - rank * share)) for rank in range(size)]
