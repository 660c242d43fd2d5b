"""The sampling parameters of one step's nodes, as tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.request import Request, SamplingParams
from engine.sampling.history import TokenHistory
from engine.spec.tree import DraftTree

COLDEST = 1e-5  # the lowest temperature that is told from greedy


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


def effective_temperature(params: SamplingParams) -> float:
    """0 (greedy) below COLDEST: dividing by less would overflow float32."""
    return params.temperature if params.temperature >= COLDEST else 0.0


def is_penalised(params: SamplingParams) -> bool:
    return (
        params.repetition_penalty != 1.0
        or params.presence_penalty != 0.0
        or params.frequency_penalty != 0.0
    )


@dataclass(frozen=True, slots=True)
class Nodes:
    """The tree nodes that draw a token, R of them, as host arrays."""

    tree_of: NDArray[np.int64]  # [R] which row
    depth: NDArray[np.int64]  # [R]
    path: Callable[[int], tuple[int, ...]]  # of node r: the tokens from below the root down to it

    @classmethod
    def of(cls, tree: DraftTree) -> Nodes:
        sizes = tree.sizes.numpy()
        tree_of = np.repeat(np.arange(len(sizes)), sizes)
        firsts = np.cumsum(sizes) - sizes
        node_of = np.arange(len(tree_of)) - firsts[tree_of]
        tokens, parents = tree.tokens.numpy(), tree.parents.numpy()

        def path(r: int) -> tuple[int, ...]:
            row, node = int(tree_of[r]), int(node_of[r])
            found: list[int] = []
            while node > 0:
                found.append(int(tokens[row, node]))
                node = int(parents[row, node])
            return tuple(reversed(found))

        return cls(tree_of, tree.depths.numpy()[tree_of, node_of], path)


def build_sampling_batch(
    rows: Sequence[RowState], tree: DraftTree, eos_token_ids: Iterable[int], vocab_size: int
) -> SamplingBatch:
    """The parameters of every node that draws a token, row by row, each with the history of its
    own path: the row's tokens and those of the nodes above."""
    nodes = Nodes.of(tree)
    params = [row.request.params for row in rows]
    temperature = np.array([effective_temperature(p) for p in params], dtype=np.float32)
    top_k = np.array([p.top_k or vocab_size for p in params], dtype=np.int64)
    top_p = np.array([p.top_p for p in params], dtype=np.float32)
    min_p = np.array([p.min_p for p in params], dtype=np.float32)
    seeds = np.array([p.seed for p in params], dtype=np.uint64).view(np.int64)
    lengths = np.array([len(row.request.prompt_ids) + row.num_output for row in rows])
    sampled = temperature > 0
    filtered = sampled & ((top_k < vocab_size) | (top_p < 1) | (min_p > 0))

    def spread(values: NDArray[Any]) -> Tensor:
        return torch.from_numpy(values[nodes.tree_of])

    return SamplingBatch(
        temperature=spread(temperature),
        top_k=spread(np.minimum(top_k, vocab_size)),
        top_p=spread(top_p),
        min_p=spread(min_p),
        seeds=spread(seeds),
        positions=torch.from_numpy(lengths[nodes.tree_of] + nodes.depth),
        any_sampled=bool(sampled.any()),
        any_greedy=not sampled.all(),
        any_filtered=bool(filtered.any()),
        penalties=_penalties(rows, nodes),
        bias=_bias(params, nodes),
        forbidden=_forbidden(rows, nodes, tuple(eos_token_ids)),
        num_logprobs=tuple(params[row].logprobs for row in nodes.tree_of.tolist()),
    )


def _nodes_of(rows: Iterable[int], nodes: Nodes) -> list[int]:
    """The nodes that belong to the rows."""
    return np.isin(nodes.tree_of, list(rows)).nonzero()[0].tolist()


def _penalties(rows: Sequence[RowState], nodes: Nodes) -> Penalties | None:
    penalised = {at: row.history for at, row in enumerate(rows) if row.history is not None}
    if not penalised:
        return None
    at = _nodes_of(penalised, nodes)
    owners = [int(nodes.tree_of[r]) for r in at]
    seen = [penalised[row].along(nodes.path(r)) for r, row in zip(at, owners, strict=True)]
    sizes = [len(ids) for ids, _ in seen]
    params = [rows[row].request.params for row in owners]

    def spread(values: list[float]) -> Tensor:
        return torch.from_numpy(np.repeat(np.array(values, dtype=np.float32), sizes))

    ids = np.concatenate([ids for ids, _ in seen])
    counts = np.concatenate([counts for _, counts in seen])
    return Penalties(
        at=Edits(
            torch.from_numpy(np.repeat(np.array(at, dtype=np.int64), sizes)), torch.from_numpy(ids)
        ),
        counts=torch.from_numpy(counts.astype(np.float32)),
        repetition=spread([p.repetition_penalty for p in params]),
        frequency=spread([p.frequency_penalty for p in params]),
        presence=spread([p.presence_penalty for p in params]),
    )


def _bias(params: Sequence[SamplingParams], nodes: Nodes) -> tuple[Edits, Tensor] | None:
    biased = [row for row, p in enumerate(params) if p.logit_bias]
    entries = [
        (at, token, value)
        for at in (_nodes_of(biased, nodes) if biased else ())
        for token, value in params[int(nodes.tree_of[at])].logit_bias.items()
    ]
    if not entries:
        return None
    at, ids, values = zip(*entries, strict=True)
    return Edits(torch.tensor(at), torch.tensor(ids)), torch.tensor(values, dtype=torch.float32)


def _forbidden(
    rows: Sequence[RowState], nodes: Nodes, eos_token_ids: tuple[int, ...]
) -> Edits | None:
    """Tokens that would end a text which has not `min_tokens` yet."""
    held = [at for at, row in enumerate(rows) if row.num_output < row.request.params.min_tokens]
    entries = []
    for at in _nodes_of(held, nodes) if held else ():
        row = rows[int(nodes.tree_of[at])]
        params = row.request.params
        if row.num_output + int(nodes.depth[at]) < params.min_tokens:
            ends = () if params.ignore_eos else eos_token_ids
            entries += [(at, token) for token in (*params.stop_token_ids, *ends)]
    if not entries:
        return None
    at_nodes, ids = zip(*entries, strict=True)
    return Edits(torch.tensor(at_nodes), torch.tensor(ids))
