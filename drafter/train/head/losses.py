"""Losses of draft heads against the target's distribution and features."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

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


TokenLossKind = Literal["cross_entropy", "acceptance", "lk", "top_k"]
LEAST_OVERLAP = 1e-5  # bounds the gradient of -log of the overlap


@dataclass(frozen=True, slots=True)
class TokenLoss:
    """What is made smaller for each token to predict, p being the target's distribution over the
    draft vocabulary, q the head's, and a = sum of min(p, q) their overlap: the share of drafts that
    rejection sampling accepts.

    cross_entropy: -sum p log q.
    acceptance: -log a (arXiv:2602.23881).
    lk: w KL(p, q) + (1 - w) (1 - a), in which w = exp(-eta a) is a constant for gradients (hybrid
    loss of the same paper): like cross-entropy while little is accepted, then the overlap itself.
    top_k: cross-entropy with the `top_k` likeliest tokens of p alone, which then sum to 1.
    """

    kind: TokenLossKind = "cross_entropy"
    eta: float = 3.0
    top_k: int = 16

    def of(self, log_q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of each row [N], and its gradient for the logits [N, V]; `log_q` may be
        overwritten."""
        match self.kind:
            case "cross_entropy":
                return _cross_entropy(log_q, p)
            case "top_k":
                return _cross_entropy(log_q, _likeliest(p, self.top_k))
            case "acceptance":
                overlap, rise = _overlap(log_q.exp(), p)
                bounded = overlap.clamp(min=LEAST_OVERLAP)
                return -bounded.log(), -rise / bounded[:, None]
            case "lk":
                q = log_q.exp()
                overlap, rise = _overlap(q, p)
                weight = torch.exp(-self.eta * overlap)
                divergence = (torch.xlogy(p, p) - p * log_q).sum(dim=-1)
                loss = weight * divergence + (1 - weight) * (1 - overlap)
                weight = weight[:, None]
                return loss, weight * (q - p) - (1 - weight) * rise


CROSS_ENTROPY = TokenLoss()


def _cross_entropy(log_q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    loss = -torch.linalg.vecdot(p, log_q)
    return loss, log_q.exp_().sub_(p)


def _likeliest(p: Tensor, count: int) -> Tensor:
    """The `count` likeliest tokens of each row, which then sum to 1; zeros elsewhere."""
    best = p.topk(min(count, p.shape[1]), dim=-1)
    kept = torch.zeros_like(p).scatter_(1, best.indices, best.values)
    return kept / kept.sum(dim=-1, keepdim=True)


def _overlap(q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """a = sum of min(p, q) [N], and its gradient for the logits [N, V]: q (b - sum of b q), in
    which b is 1 where q is below p."""
    below = q * (q < p)
    return torch.minimum(p, q).sum(dim=-1), below - q * below.sum(dim=-1, keepdim=True)


@dataclass(frozen=True, slots=True)
class RowLoss:
    """How losses of rows of logits are computed: `teacher` makes of the target's hidden states what
    `of` reads, as `teacher_probabilities` and `losses_of_rows` do."""

    teacher: Callable[[Tensor, Tensor, torch.dtype], Tensor]
    of: Callable[[Tensor, Tensor, Tensor, Tensor, TokenLoss], tuple[Tensor, Tensor]]


def losses_of_rows(
    logits: Tensor, teacher: Tensor, rows: Tensor, kept: Tensor, kind: TokenLoss
) -> tuple[Tensor, Tensor]:
    """The loss of each row, [N] float32, and its likeliest column, [N] int64. `logits` [N, V] are
    replaced by the gradients of the losses.

    Args:
        teacher: [M, V] probabilities.
        rows: [N] int64, the teacher's row of each row.
        kept: [N] bool; the other rows have loss and gradient 0.
    """
    best = torch.empty(len(rows), dtype=torch.int64, device=rows.device)
    loss = torch.empty(len(rows), dtype=torch.float32, device=rows.device)
    for part in _chunks(logits):  # so the float32 logits of all rows never exist at once
        best[part] = logits[part].argmax(dim=-1)
        log_q = functional.log_softmax(logits[part], dim=-1, dtype=torch.float32)
        found, slope = kind.of(log_q, teacher[rows[part]].float())
        loss[part] = found * kept[part]
        logits[part] = slope.mul_(kept[part, None])
    return loss, best


IN_TORCH = RowLoss(teacher_probabilities, losses_of_rows)


def token_loss(
    inputs: Tensor,
    head: Tensor,
    teacher: Tensor,
    rows: Tensor,
    kept: Tensor,
    dtype: torch.dtype,
    loss: TokenLoss = CROSS_ENTROPY,
    by: RowLoss = IN_TORCH,
) -> tuple[Tensor, Tensor]:
    """Sum over kept rows of the loss between `teacher[rows]` and the head's distribution.

    Args:
        inputs: [N, H] what the LM head reads.
        head: [V, H] the LM head.
        teacher: [M, V], from `by.teacher`.
        rows: [N] int64, the teacher's row of each input.
        kept: [N] bool, the rows that count.
        dtype: type of the matrix products; sums are float32.

    Returns:
        The loss (a scalar with gradients for `inputs` and `head`), and the likeliest draft ids [N].
    """
    if not torch.is_grad_enabled():  # `forward` would compute gradients even so
        inputs, head = inputs.detach(), head.detach()
    found: tuple[Tensor, Tensor] = _TokenLoss.apply(  # type: ignore[no-untyped-call]
        inputs, head, teacher, rows, kept, dtype, loss, by
    )
    return found


class _TokenLoss(torch.autograd.Function):
    """Product, softmax, loss and both gradients at once."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        head: Tensor,
        teacher: Tensor,
        rows: Tensor,
        kept: Tensor,
        dtype: torch.dtype,
        kind: TokenLoss,
        by: RowLoss,
    ) -> tuple[Tensor, Tensor]:
        narrow, weight = inputs.to(dtype), head.to(dtype)
        slopes = narrow @ weight.T  # logits first, then their gradients
        loss, best = by.of(slopes, teacher, rows, kept, kind)
        needs_inputs, needs_head = ctx.needs_input_grad[:2]
        ctx.save_for_backward(
            (slopes @ weight).float() if needs_inputs else None,
            (slopes.T @ narrow).float() if needs_head else None,
        )
        ctx.mark_non_differentiable(best)
        return loss.sum(), best

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor, _best: Tensor) -> tuple[Tensor | None, ...]:
        to_inputs, to_head = ctx.saved_tensors
        found = [None if one is None else one * slope for one in (to_inputs, to_head)]
        return *found, *(None,) * 6


def feature_distance(states: Tensor, features: Tensor) -> Tensor:
    """Sum over rows [N, H] of the mean smooth L1 distance to the target's features (EAGLE-1)."""
    return functional.smooth_l1_loss(states, features, reduction="none").mean(dim=-1).sum()
