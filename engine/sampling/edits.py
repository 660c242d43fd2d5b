"""Penalties, bias and forbidden tokens of every node, as one sparse change to the logits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.sampling.rows import Nodes, RowState
from kernels.sampling.pipeline_reference import ABSENT, LogitEdits

Entries = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]  # ids, counts, bias


def is_edited(row: RowState) -> bool:
    """Whether anything may change the logits of this row's next tokens."""
    params = row.request.params
    held = row.num_output < params.min_tokens
    return row.history is not None or bool(params.logit_bias) or held


def logit_edits(
    rows: Sequence[RowState], nodes: Nodes, eos_token_ids: tuple[int, ...]
) -> LogitEdits | None:
    """The changes of all nodes, each with the history of its own path; None without any."""
    edited = {at for at, row in enumerate(rows) if is_edited(row)}
    if not edited:
        return None
    nothing = (np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))
    entries = [
        _entries(rows[row], nodes, r, eos_token_ids) if row in edited else nothing
        for r, row in enumerate(nodes.tree_of.tolist())
    ]
    ids, counts, bias = (np.concatenate(parts) for parts in zip(*entries, strict=True))
    if len(ids) == 0:
        return None
    sizes = [len(found) for found, _, _ in entries]
    params = [row.request.params for row in rows]

    def spread(values: list[float]) -> Tensor:
        return torch.from_numpy(np.array(values, dtype=np.float32)[nodes.tree_of])

    return LogitEdits(
        offsets=torch.from_numpy(np.concatenate(([0], np.cumsum(sizes))).astype(np.int32)),
        ids=torch.from_numpy(ids.astype(np.int32)),
        counts=torch.from_numpy(counts.astype(np.int32)),
        bias=torch.from_numpy(bias),
        repetition=spread([p.repetition_penalty for p in params]),
        frequency=spread([p.frequency_penalty for p in params]),
        presence=spread([p.presence_penalty for p in params]),
    )


def _entries(row: RowState, nodes: Nodes, r: int, eos_token_ids: tuple[int, ...]) -> Entries:
    """What changes at node r, at most one entry per token."""
    ids, counts = np.empty(0, np.int64), np.empty(0, np.int64)
    if row.history is not None:
        ids, counts = row.history.along(nodes.path(r))
    added = _bias(row, int(nodes.depth[r]), eos_token_ids)
    if not added:
        return ids, counts, np.zeros(len(ids), np.float32)
    tokens = np.fromiter(added, np.int64, len(added))
    values = np.fromiter(added.values(), np.float32, len(added))
    new = ~np.isin(tokens, ids)
    bias = np.concatenate((np.zeros(len(ids), np.float32), values[new]))
    order = np.argsort(ids)
    bias[order[np.searchsorted(ids, tokens[~new], sorter=order)]] = values[~new]
    absent = np.full(int(new.sum()), ABSENT)
    return np.concatenate((ids, tokens[new])), np.concatenate((counts, absent)), bias


def _bias(row: RowState, depth: int, eos_token_ids: tuple[int, ...]) -> dict[int, float]:
    """Of each token; -inf for those that would end a text that has not `min_tokens` yet."""
    params = row.request.params
    bias = dict(params.logit_bias)
    if row.num_output + depth < params.min_tokens:
        ends = () if params.ignore_eos else eos_token_ids
        bias |= dict.fromkeys((*params.stop_token_ids, *ends), -np.inf)
    return bias
