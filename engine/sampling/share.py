"""How some of the rows of a step are drawn: a rank's share of them."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from kernels.sampling.pipeline_reference import DrawSettings, LogitEdits


def share_of(settings: DrawSettings, first: int, end: int) -> DrawSettings:
    """The settings of rows first .. end - 1, numbered from 0; `first` < `end`."""
    rows = slice(first, end)

    def part(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[rows]

    return replace(
        settings,  # whether any row is sampled or greedy holds for the share, if less precisely
        temperature=settings.temperature[rows],
        seeds=settings.seeds[rows],
        positions=settings.positions[rows],
        top_k=part(settings.top_k),
        top_p=part(settings.top_p),
        min_p=part(settings.min_p),
        edits=None if settings.edits is None else _edits(settings.edits, first, end),
        allowed=part(settings.allowed),
    )


def _edits(edits: LogitEdits, first: int, end: int) -> LogitEdits:
    """Entries of the rows alone, which waits for the device."""
    offsets = edits.offsets[first : end + 1]
    begin, behind = offsets[[0, -1]].tolist()
    entries, rows = slice(begin, behind), slice(first, end)
    return LogitEdits(
        offsets=offsets - begin,
        ids=edits.ids[entries],
        counts=edits.counts[entries],
        bias=edits.bias[entries],
        repetition=edits.repetition[rows],
        frequency=edits.frequency[rows],
        presence=edits.presence[rows],
    )
