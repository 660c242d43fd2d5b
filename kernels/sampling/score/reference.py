"""The operation `score` in plain torch: log-probabilities of tokens under the raw logits. Nothing
here waits for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.sampling.reference import logsumexp
from kernels.sampling.settings import Scores


def score(logits: Tensor, tokens: Tensor, num_top: int) -> Scores:
    """Log-probabilities of `tokens` [S] and of the `num_top` best tokens under the raw `logits`
    [S, V] float32, that is, before any edit and temperature."""
    return scores_of(logits, tokens, logsumexp(logits), best_tokens(logits, num_top))


def scores_of(logits: Tensor, tokens: Tensor, normaliser: Tensor, top_ids: Tensor) -> Scores:
    """As `score`, given log(sum(exp(logits))) [S] and the best tokens [S, n]."""
    chosen = logits.gather(1, tokens[:, None])[:, 0] - normaliser
    return Scores(chosen, top_ids, logits.gather(1, top_ids) - normaliser[:, None])


def best_tokens(logits: Tensor, count: int) -> Tensor:
    """[S, V] -> [S, count] int64 ids, the best first, the lower id among equals.

    `topk` may take any of equal values, so it gets integers that order by value, then by lower id.
    """
    S, V = logits.shape
    if count == 0:
        return torch.empty(S, 0, dtype=torch.int64, device=logits.device)
    bits = torch.where(logits == 0, 0.0, logits).view(torch.int32)  # no -0
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # int32 in the order of the floats
    lower_first = torch.arange(V - 1, -1, -1, device=logits.device)
    return ((order.long() << 32) | lower_first).topk(count, dim=1).indices
