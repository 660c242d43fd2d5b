"""The sampling parameters of one step's nodes, as tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.request import Request, SamplingParams
from engine.sampling.history import TokenHistory


@dataclass(frozen=True, slots=True)
class Edits:
    """Sparse changes to logits: entry e concerns logits[rows[e], ids[e]]."""

    rows: Tensor  # [E] int64
    ids: Tensor  # [E] int64


@dataclass(frozen=True, slots=True)
class Penalties:
    """History entries of the penalised nodes, with the strengths of their node."""

    at: Edits
    counts: Tensor  # [E] float32, occurrences in the output
    repetition: Tensor  # [E] float32
    frequency: Tensor  # [E] float32
    presence: Tensor  # [E] float32


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """How the token behind each of R nodes is drawn. Parts that no node uses are None."""

    temperature: Tensor  # [R] float32, 0 is greedy
    top_k: Tensor  # [R] int64, vocabulary size when off
    top_p: Tensor  # [R] float32
    min_p: Tensor  # [R] float32
    seeds: Tensor  # [R] int64, the bits of the unsigned seed
    positions: Tensor  # [R] int64, absolute position of the token to draw
    any_sampled: bool
    any_greedy: bool
    any_filtered: bool
    penalties: Penalties | None
    bias: tuple[Edits, Tensor] | None
    forbidden: Edits | None  # tokens that must not be drawn yet (min_tokens)
    num_logprobs: tuple[int | None, ...]  # per node


@dataclass(slots=True)
class RowState:
    """What the sampler remembers of a running request."""

    request: Request
    num_output: int
    history: TokenHistory | None  # only for penalised requests

    @classmethod
    def admit(cls, request: Request, output_ids: Sequence[int]) -> RowState:
        penalised = is_penalised(request.params)
        history = TokenHistory(request.prompt_ids, output_ids) if penalised else None
        return cls(request, len(output_ids), history)

    def extend(self, token_ids: Sequence[int]) -> None:
        """Take in tokens committed to the output."""
        self.num_output += len(token_ids)
        if self.history is not None:
            self.history.extend(token_ids)


def is_penalised(params: SamplingParams) -> bool:
    return (
        params.repetition_penalty != 1.0
        or params.presence_penalty != 0.0
        or params.frequency_penalty != 0.0
    )


def build_sampling_batch(
    rows: Sequence[RowState], eos_token_ids: Iterable[int], vocab_size: int
) -> SamplingBatch:
    """Gather the parameters of the rows that draw a token in this step, in batch order."""
    params = [row.request.params for row in rows]
    temperature = np.array([p.temperature for p in params], dtype=np.float32)
    top_k = np.array([p.top_k or vocab_size for p in params], dtype=np.int64)
    top_p = np.array([p.top_p for p in params], dtype=np.float32)
    min_p = np.array([p.min_p for p in params], dtype=np.float32)
    positions = [len(row.request.prompt_ids) + row.num_output for row in rows]
    sampled = temperature > 0
    filtered = sampled & ((top_k < vocab_size) | (top_p < 1) | (min_p > 0))
    return SamplingBatch(
        temperature=torch.from_numpy(temperature),
        top_k=torch.from_numpy(np.minimum(top_k, vocab_size)),
        top_p=torch.from_numpy(top_p),
        min_p=torch.from_numpy(min_p),
        seeds=torch.from_numpy(np.array([p.seed for p in params], dtype=np.uint64).view(np.int64)),
        positions=torch.tensor(positions, dtype=torch.int64),
        any_sampled=bool(sampled.any()),
        any_greedy=not sampled.all(),
        any_filtered=bool(filtered.any()),
        penalties=_penalties(rows),
        bias=_bias(params),
        forbidden=_forbidden(rows, tuple(eos_token_ids)),
        num_logprobs=tuple(p.logprobs for p in params),
    )


def _penalties(rows: Sequence[RowState]) -> Penalties | None:
    penalised = [
        (at, row.request.params, row.history) for at, row in enumerate(rows) if row.history
    ]
    if not penalised:
        return None
    sizes = [len(history.ids) for _, _, history in penalised]

    def spread(values: list[float]) -> Tensor:
        return torch.from_numpy(np.repeat(np.array(values, dtype=np.float32), sizes))

    nodes = np.repeat(np.array([at for at, _, _ in penalised], dtype=np.int64), sizes)
    ids = np.concatenate([history.ids for _, _, history in penalised])
    counts = np.concatenate([history.counts for _, _, history in penalised])
    return Penalties(
        at=Edits(torch.from_numpy(nodes), torch.from_numpy(ids)),
        counts=torch.from_numpy(counts.astype(np.float32)),
        repetition=spread([p.repetition_penalty for _, p, _ in penalised]),
        frequency=spread([p.frequency_penalty for _, p, _ in penalised]),
        presence=spread([p.presence_penalty for _, p, _ in penalised]),
    )


def _bias(params: Sequence[SamplingParams]) -> tuple[Edits, Tensor] | None:
    entries = [
        (at, token, value) for at, p in enumerate(params) for token, value in p.logit_bias.items()
    ]
    if not entries:
        return None
    nodes, ids, values = zip(*entries, strict=True)
    return Edits(torch.tensor(nodes), torch.tensor(ids)), torch.tensor(values, dtype=torch.float32)


def _forbidden(rows: Sequence[RowState], eos_token_ids: tuple[int, ...]) -> Edits | None:
    entries = [
        (at, token)
        for at, row in enumerate(rows)
        if row.num_output < row.request.params.min_tokens
        for token in (*row.request.params.stop_token_ids, *eos_token_ids)
    ]
    if not entries:
        return None
    nodes, ids = zip(*entries, strict=True)
    return Edits(torch.tensor(nodes), torch.tensor(ids))
