"""Sampling spread over ranks: every rank gets the whole logits of its share of the rows, and
samples them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine.step.group import TPGroup
from kernels.ops import Ops
from kernels.sampling.draw.reference import are_allowed, masked
from kernels.sampling.settings import BiasEntries, DrawSettings, LogitEdits, Penalties, Scores

# The token of a row whose logits are unsound (`Ops.are_sound`): none is drawn from it, and its
# request ends with an error. This is the rule for every backend, whose draws take NaN differently.
UNSOUND = -1


@dataclass(frozen=True, slots=True)
class SpreadLogits:
    """Logits [R, V], of which this rank has rows `first` .. `first + len(own) - 1`."""

    own: Tensor  # [r, V] float32, before any edit
    first: int
    num_rows: int  # R
    group: TPGroup
    ops: Ops

    @classmethod
    def of(cls, local: Tensor, vocab_size: int, group: TPGroup, ops: Ops) -> SpreadLogits:
        """From this rank's slice [R, V / ranks] of all rows; the last slices may be padded."""
        counts = row_counts(len(local), group.size)
        own = group.to_owners(local, counts)[:, :vocab_size]
        return cls(own.contiguous(), sum(counts[: group.rank]), len(local), group, ops)

    def draw(self, settings: DrawSettings, edits: LogitEdits | None) -> Tensor:
        """One token per row, [R] int64, the same on every rank; UNSOUND where the logits are.
        `settings` and `edits` are those of all rows. A token depends only on its row's logits and
        parameters."""
        mine = slice(self.first, self.first + len(self.own))
        if self.group.size == 1:
            return self._drawn(settings, edits)
        width = row_counts(self.num_rows, self.group.size)[0]
        drawn = torch.zeros(width, dtype=torch.int64, device=self.own.device)
        if len(self.own):
            part = None if edits is None else edits_of(edits, mine)
            drawn[: len(self.own)] = self._drawn(settings_of(settings, mine), part)
        return self.group.stack(drawn).flatten()[: self.num_rows]

    def score(
        self,
        at: Tensor,
        tokens: Tensor,
        num_top: int,
        named: Tensor | None = None,
        allowed: Tensor | None = None,
    ) -> Scores:
        """Log-probabilities of `tokens` [S], token s in row at[s], and of the best `num_top`
        alternatives, before penalties and temperature. Those of unsound rows are NaN.

        Args:
            named: [S, L] tokens to score after the alternatives.
            allowed: the masks of all rows, as `DrawSettings.allowed`: other tokens have no
                probability.
        """
        if self.group.size == 1:
            return self._scored(at, tokens, num_top, named, allowed, at)
        mine = (at >= self.first) & (at < self.first + len(self.own))
        if len(self.own):
            place = torch.where(mine, at - self.first, 0)
            found = self._scored(place, tokens, num_top, named, allowed, at)
        else:
            columns = num_top if named is None else num_top + named.shape[1]
            found = Scores(
                self.own.new_zeros(len(at)),
                torch.zeros(len(at), columns, dtype=torch.int64, device=self.own.device),
                self.own.new_zeros(len(at), columns),
            )
        # Each entry comes from one rank and is zero on all others.
        return Scores(
            self.group.all_reduce(torch.where(mine, found.chosen, 0)),
            self.group.all_reduce(torch.where(mine[:, None], found.top_ids, 0)),
            self.group.all_reduce(torch.where(mine[:, None], found.top, 0)),
        )

    def _drawn(self, settings: DrawSettings, edits: LogitEdits | None) -> Tensor:
        logits = self.own if edits is None else self.ops.edit_logits(self.own, edits)
        drawn, sound = self.ops.draw(logits, settings), self.ops.are_sound(self.own)
        if settings.allowed is not None:  # nothing allowed may have a finite logit
            sound &= are_allowed(drawn, settings.allowed)
        return torch.where(sound, drawn, UNSOUND)

    def _scored(
        self,
        rows: Tensor,
        tokens: Tensor,
        num_top: int,
        named: Tensor | None,
        allowed: Tensor | None,
        at: Tensor,
    ) -> Scores:
        """`rows`: of this rank's logits; `at`: the same among all rows."""
        logits = masked(self.own[rows], None if allowed is None else allowed[at])
        found = self.ops.score(logits, tokens, num_top)
        if named is not None:
            found = _with_named(found, logits, tokens, named)
        return replace(
            found, chosen=torch.where(self.ops.are_sound(logits), found.chosen, torch.nan)
        )


def _with_named(found: Scores, logits: Tensor, tokens: Tensor, named: Tensor) -> Scores:
    """`found`, the scores of `tokens` [S], with those of the tokens `named` [S, L] after the best.
    A named token that is the row's own has the same log-probability, to the last bit."""
    chosen = found.chosen[:, None]
    normaliser = logits.gather(1, tokens[:, None]) - chosen
    values = torch.where(named == tokens[:, None], chosen, logits.gather(1, named) - normaliser)
    return replace(
        found,
        top_ids=torch.cat([found.top_ids, named], dim=1),
        top=torch.cat([found.top, values], dim=1),
    )


def row_counts(num_rows: int, size: int) -> list[int]:
    """How many rows each of `size` ranks samples: equal shares; the last ranks may get fewer or
    none."""
    share = -(-num_rows // size)
    return [max(0, min(share, num_rows - rank * share)) for rank in range(size)]


def settings_of(settings: DrawSettings, rows: slice) -> DrawSettings:
    """The settings of some rows. `any_sampled` and `any_greedy` stay those of all rows."""

    def part(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[rows]

    return replace(
        settings,
        temperature=settings.temperature[rows],
        seeds=settings.seeds[rows],
        positions=settings.positions[rows],
        top_k=part(settings.top_k),
        top_p=part(settings.top_p),
        min_p=part(settings.min_p),
        allowed=part(settings.allowed),
    )


def edits_of(edits: LogitEdits, rows: slice) -> LogitEdits:
    """The edits of some rows."""
    return LogitEdits(
        positions=edits.positions[rows],
        penalties=None if edits.penalties is None else _penalties_of(edits.penalties, rows),
        bias=None if edits.bias is None else _bias_of(edits.bias, rows),
    )


def _penalties_of(penalties: Penalties, rows: slice) -> Penalties:
    return replace(
        penalties,
        lines=penalties.lines[rows],
        paths=penalties.paths[rows],
        repetition=penalties.repetition[rows],
        frequency=penalties.frequency[rows],
        presence=penalties.presence[rows],
    )


def _bias_of(bias: BiasEntries, rows: slice) -> BiasEntries:
    return replace(bias, lists=bias.lists[rows])
