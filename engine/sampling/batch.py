"""The sampling parameters of one step's nodes, as tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.sampling.edits import logit_edits
from engine.sampling.rows import Nodes, RowState, effective_temperature, unsigned_bits
from engine.step.tree import DraftTree
from kernels.sampling.pipeline_reference import DrawSettings


def draw_settings(
    rows: Sequence[RowState], tree: DraftTree, eos_token_ids: Iterable[int], vocab_size: int
) -> DrawSettings:
    """The parameters of every node that draws a token, row by row, each with the history of its
    own path: the row's tokens and those of the nodes above."""
    nodes = Nodes.of(tree)
    params = [row.request.params for row in rows]
    temperature = np.array([effective_temperature(p) for p in params], dtype=np.float32)
    top_k = np.array([p.top_k or vocab_size for p in params], dtype=np.int64)
    top_p = np.array([p.top_p for p in params], dtype=np.float32)
    min_p = np.array([p.min_p for p in params], dtype=np.float32)
    seeds = unsigned_bits([p.seed for p in params])
    lengths = np.array([len(row.request.prompt_ids) + row.num_output for row in rows])
    sampled = temperature > 0

    def spread(values: NDArray[Any]) -> Tensor:
        return torch.from_numpy(values[nodes.tree_of])

    def spread_used(values: NDArray[Any], used: NDArray[np.bool_]) -> Tensor | None:
        return spread(values) if bool((used & sampled).any()) else None

    return DrawSettings(
        temperature=spread(temperature),
        seeds=spread(seeds),
        positions=torch.from_numpy(lengths[nodes.tree_of] + nodes.depth),
        top_k=spread_used(np.minimum(top_k, vocab_size), top_k < vocab_size),
        top_p=spread_used(top_p, top_p < 1),
        min_p=spread_used(min_p, min_p > 0),
        edits=logit_edits(rows, nodes, tuple(eos_token_ids)),
        any_sampled=bool(sampled.any()),
        any_greedy=not sampled.all(),
    )
