"""Penalties and bias for CPUs: the result of `reference.edit_logits`, but faster.

Only the tokens that were seen are penalised, in the rows that have penalties. Shapes depend on
values, so another device would have to be waited for; it has its own kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.sampling.edit.reference import penalised
from kernels.sampling.settings import BiasEntries, LogitEdits, Penalties


def edit_logits(logits: Tensor, edits: LogitEdits) -> Tensor:
    """The operation `edit_logits`, equal to the reference bit for bit."""
    edited = logits.clone()
    if edits.penalties is not None:
        _penalise(edited, edits.penalties)
    if edits.bias is not None:
        _add_bias(edited, edits.positions, edits.bias)
    return edited


def _penalise(logits: Tensor, penalties: Penalties) -> None:
    """In place. All nodes of a tree continue one line, which is searched only once."""
    rows = penalties.active.nonzero()[:, 0]
    lines = penalties.lines[rows]
    for line in lines.unique().tolist():
        _penalise_line(logits, penalties, line, rows[lines == line])


def _penalise_line(logits: Tensor, penalties: Penalties, line: int, rows: Tensor) -> None:
    """In place: penalise the tokens that any of `rows` [A] has seen. They all continue `line`."""
    counts, paths = penalties.counts[line], penalties.paths[rows]
    ids = torch.cat((counts.nonzero()[:, 0], paths[paths >= 0])).unique()  # [n]
    seen = counts[ids] + 2 * (paths[:, :, None] == ids).sum(dim=1)  # [A, n]
    at = rows[:, None], ids
    strengths = penalties.repetition, penalties.frequency, penalties.presence
    values = penalised(logits[at], seen >> 1, *(part[rows, None] for part in strengths))
    logits[at] = torch.where(seen > 0, values, logits[at])


def _add_bias(logits: Tensor, positions: Tensor, bias: BiasEntries) -> None:
    """In place; a token with two entries gets both."""
    ids = bias.ids[bias.lists]  # [R, M]
    applies = (ids >= 0) & (positions[:, None] < bias.until[bias.lists])
    rows, entries = applies.nonzero(as_tuple=True)
    values = bias.values[bias.lists[rows], entries]
    logits.index_put_((rows, ids[rows, entries]), values, accumulate=True)
