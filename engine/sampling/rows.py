"""A selection of the rows of a `SamplingBatch`."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from engine.sampling.batch import Edits, Penalties, SamplingBatch


def rows_of(batch: SamplingBatch, first: int, end: int) -> SamplingBatch:
    """How the nodes first .. end - 1 are drawn, numbered from 0."""
    rows = slice(first, end)
    temperature = batch.temperature[rows]
    sampled = temperature > 0
    return SamplingBatch(
        temperature=temperature,
        top_k=batch.top_k[rows],
        top_p=batch.top_p[rows],
        min_p=batch.min_p[rows],
        seeds=batch.seeds[rows],
        positions=batch.positions[rows],
        any_sampled=bool(sampled.any()),
        any_greedy=not bool(sampled.all()),
        any_filtered=batch.any_filtered,  # filters that are off leave a row as it is
        penalties=_penalties(batch.penalties, first, end),
        bias=_bias(batch.bias, first, end),
        forbidden=None if batch.forbidden is None else _edits(batch.forbidden, first, end)[0],
        num_logprobs=batch.num_logprobs[rows],
    )


def _edits(edits: Edits, first: int, end: int) -> tuple[Edits, Tensor]:
    """Those of the nodes, and which ones they are."""
    kept = ((edits.rows >= first) & (edits.rows < end)).nonzero()[:, 0]
    return Edits(edits.rows[kept] - first, edits.ids[kept]), kept


def _penalties(penalties: Penalties | None, first: int, end: int) -> Penalties | None:
    if penalties is None:
        return None
    at, kept = _edits(penalties.at, first, end)
    return replace(
        penalties,
        at=at,
        counts=penalties.counts[kept],
        repetition=penalties.repetition[kept],
        frequency=penalties.frequency[kept],
        presence=penalties.presence[kept],
    )


def _bias(bias: tuple[Edits, Tensor] | None, first: int, end: int) -> tuple[Edits, Tensor] | None:
    if bias is None:
        return None
    at, kept = _edits(bias[0], first, end)
    return at, bias[1][kept]
