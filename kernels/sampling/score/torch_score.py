"""Log-probabilities for CPUs: the result of `reference.score`, but faster.

Equal logits are rare, so `topk` alone finds the best tokens of nearly every row. Which rows need
more depends on values, so another device would have to be waited for; it has its own kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.sampling.score import reference
from kernels.sampling.score.reference import scores_of
from kernels.sampling.settings import Scores


@dataclass(frozen=True, slots=True)
class TorchScore:
    """The operation `score`, built on a backend's log-sum-exp."""

    logsumexp: Callable[[Tensor], Tensor]

    def __call__(self, logits: Tensor, tokens: Tensor, num_top: int) -> Scores:
        """logits [S, V] float32, tokens [S] int64."""
        return scores_of(logits, tokens, self.logsumexp(logits), best_tokens(logits, num_top))


def best_tokens(logits: Tensor, count: int) -> Tensor:
    """[S, V] -> [S, count] int64 ids, the best first, the lower id among equals."""
    if count == 0:
        return torch.empty(len(logits), 0, dtype=torch.int64)
    # One more than `count`, because the last one may have equals.
    values, ids = logits.topk(min(count + 1, logits.shape[1]), dim=1)
    ids = ids[:, :count].contiguous()
    unsettled = ~(values[:, :-1] > values[:, 1:]).all(dim=1)
    if bool(unsettled.any()):
        ids[unsettled] = reference.best_tokens(logits[unsettled], count)
    return ids
