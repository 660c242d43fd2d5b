"""Losses of draft heads against the target's distribution and features."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

CHUNKS = {"cpu": 128, "cuda": 8192}  # rows of logits at a time: on a CPU they stay in the cache


def teacher_probabilities(hidden: Tensor, head: Tensor, dtype: torch.dtype) -> Tensor:
    """The target's distribution over the rows of `head`: the softmax of hidden [N, H] times
    head [V, H], as [N, V] of `dtype`."""
    head = head.to(dtype)
    result = torch.empty(len(hidden), len(head), dtype=dtype, device=hidden.device)
    for part in _chunks(hidden):
        result[part] = (hidden[part].to(dtype) @ head.T).float().softmax(dim=-1)
    return result


def _chunks(rows: Tensor) -> Iterator[slice]:
    size = CHUNKS[rows.device.type]
    return (slice(first, first + size) for first in range(0, len(rows), size))


def soft_cross_entropy(
    inputs: Tensor, head: Tensor, teacher: Tensor, rows: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Sum over rows of the cross-entropy between `teacher[rows]` and the head's distribution.

    Args:
        inputs: [N, H] what the LM head reads.
        head: [V, H] the LM head.
        teacher: [M, V] probabilities.
        rows: [N] int64, the teacher's row of each input.
        dtype: type of the matrix products; sums are float32.

    Returns:
        The loss (a scalar with gradients for `inputs` and `head`), and the likeliest draft ids [N].
    """
    if not torch.is_grad_enabled():  # `forward` would compute gradients even so
        inputs, head = inputs.detach(), head.detach()
    found: tuple[Tensor, Tensor] = _SoftCrossEntropy.apply(inputs, head, teacher, rows, dtype)  # type: ignore[no-untyped-call]
    return found


class _SoftCrossEntropy(torch.autograd.Function):
    """Product, softmax, loss and both gradients in one pass over chunks of rows, so the float32
    logits of all rows never exist at once. d loss / d logits = softmax(logits) - teacher."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        head: Tensor,
        teacher: Tensor,
        rows: Tensor,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        narrow, weight = inputs.to(dtype), head.to(dtype)
        slopes = narrow @ weight.T  # logits first; each chunk is then replaced by its gradient
        best = torch.empty(len(rows), dtype=torch.int64, device=rows.device)
        loss = torch.zeros((), device=inputs.device)
        for part in _chunks(slopes):
            logits = slopes[part]
            wanted = teacher[rows[part]].float()
            best[part] = logits.argmax(dim=-1)
            log_q = functional.log_softmax(logits, dim=-1, dtype=torch.float32)
            loss -= torch.dot(wanted.flatten(), log_q.flatten())
            slopes[part] = log_q.exp_().sub_(wanted)
        needs_inputs, needs_head = ctx.needs_input_grad[:2]
        ctx.save_for_backward(
            (slopes @ weight).float() if needs_inputs else None,
            (slopes.T @ narrow).float() if needs_head else None,
        )
        ctx.mark_non_differentiable(best)
        return loss, best

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor, _best: Tensor) -> tuple[Tensor | None, ...]:
        to_inputs, to_head = ctx.saved_tensors
        found = [None if one is None else one * slope for one in (to_inputs, to_head)]
        return *found, None, None, None


def feature_distance(states: Tensor, features: Tensor) -> Tensor:
    """Sum over rows [N, H] of the mean smooth L1 distance to the target's features (EAGLE-1)."""
    return functional.smooth_l1_loss(states, features, reduction="none").mean(dim=-1).sum()
