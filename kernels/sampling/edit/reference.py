"""The operation `edit_logits` in plain torch: repetition penalty, frequency and presence penalties,
then bias. It comes before `draw`. Nothing here waits for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.sampling.settings import BiasEntries, LogitEdits, Penalties


def edit_logits(logits: Tensor, edits: LogitEdits) -> Tensor:
    """The logits [R, V] float32 after penalties and bias: a changed copy."""
    penalties, bias = edits.penalties, edits.bias
    edited = logits.clone() if penalties is None else _penalise(logits, penalties)
    return edited if bias is None else _add_bias(edited, edits.positions, bias)


def _penalise(logits: Tensor, penalties: Penalties) -> Tensor:
    used = penalties.paths >= 0
    drafted = torch.where(used, penalties.paths, 0)
    seen = penalties.counts[penalties.lines].scatter_add(1, drafted, 2 * used.int())  # [R, V]
    strengths = penalties.repetition, penalties.frequency, penalties.presence
    values = penalised(logits, seen >> 1, *(part[:, None] for part in strengths))
    return torch.where(penalties.active[:, None] & (seen > 0), values, logits)


def penalised(
    raw: Tensor, counts: Tensor, repetition: Tensor, frequency: Tensor, presence: Tensor
) -> Tensor:
    """Penalised logits of tokens that were seen, `counts` times in the output.

    Repetition (arXiv:1909.05858) counts prompt and output. Frequency and presence count the output,
    as the OpenAI API defines them: subtract count * frequency + (count > 0) * presence."""
    values = torch.where(raw > 0, raw / repetition, raw * repetition)
    values = values - counts * frequency
    return values - (counts > 0) * presence


def _add_bias(edited: Tensor, positions: Tensor, bias: BiasEntries) -> Tensor:
    ids = bias.ids[bias.lists]  # [R, M]
    applies = (ids >= 0) & (positions[:, None] < bias.until[bias.lists])
    # Entries that do not apply add -0.0 to token 0, which changes no number.
    values = torch.where(applies, bias.values[bias.lists], -0.0)
    return edited.scatter_add(1, torch.where(applies, ids, 0), values)
