"""Penalties and bias for CPUs: what `pipeline_reference.edit_logits` computes, quicker.

Only the tokens that were seen are penalised, in the rows that have penalties. Shapes depend on
values, so on another device this waits for it; devices have kernels of their own.
"""

from __future__ import annotations

from torch import Tensor

from kernels.sampling.pipeline_reference import (
    BiasEntries,
    LogitEdits,
    Penalties,
    penalised,
    with_paths,
)


def edit_logits(logits: Tensor, edits: LogitEdits) -> Tensor:
    """The operation `edit_logits`, to the bit."""
    edited = logits.clone()
    if edits.penalties is not None:
        _penalise(edited, edits.penalties)
    if edits.bias is not None:
        _add_bias(edited, edits.positions, edits.bias)
    return edited


def _penalise(logits: Tensor, penalties: Penalties) -> None:
    """In place, the tokens that were seen in rows that have penalties."""
    rows = penalties.active.nonzero()[:, 0]  # [A]
    seen = with_paths(penalties.counts[penalties.lines[rows]], penalties.paths[rows])  # [A, V]
    active, ids = seen.nonzero(as_tuple=True)
    at = rows[active], ids
    strengths = penalties.repetition, penalties.frequency, penalties.presence
    logits[at] = penalised(logits[at], seen[active, ids] >> 1, *(part[at[0]] for part in strengths))


def _add_bias(logits: Tensor, positions: Tensor, bias: BiasEntries) -> None:
    """In place; a token with two entries gets both."""
    ids = bias.ids[bias.lists]  # [R, M]
    applies = (ids >= 0) & (positions[:, None] < bias.until[bias.lists])
    rows, entries = applies.nonzero(as_tuple=True)
    values = bias.values[bias.lists[rows], entries]
    logits.index_put_((rows, ids[rows, entries]), values, accumulate=True)
