"""The loss of draft tokens and its gradient for the logits, in one Triton kernel: a row of logits
is read where it lies in bfloat16, and replaced by its gradient. All sums are float32, and no
distribution is ever written to memory.
"""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton_launch import Launch
from kernels.triton_overlap import await_inputs

LossKind = Literal["cross_entropy", "acceptance", "lk"]
_LARGEST_BLOCK = 8192  # values of a row at a time
_NO_COLUMN = tl.constexpr(2**31 - 1)


@triton.jit
def _load(ptr, start, V: tl.constexpr, BLOCK: tl.constexpr):
    """[BLOCK] float32 values of a row from column `start` on, -inf after the last one."""
    column = start + tl.arange(0, BLOCK)
    return tl.load(ptr + column, mask=column < V, other=float("-inf")).to(tl.float32)


@triton.jit
def _log_sum_and_best(ptr, V: tl.constexpr, BLOCK: tl.constexpr):
    """log(sum(exp(row))), and the first column with the largest value."""
    most = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    best = tl.full((), 0, tl.int32)
    for start in range(0, V, BLOCK):
        values = _load(ptr, start, V, BLOCK)
        here = tl.max(values, axis=0)
        column = start + tl.arange(0, BLOCK)
        at = tl.min(tl.where(values == here, column, _NO_COLUMN), axis=0)
        best = tl.where(here > most, at, best)
        higher = tl.maximum(most, here)
        total = total * tl.exp(most - higher) + tl.sum(tl.exp(values - higher), axis=0)
        most = higher
    return most + tl.log(total), best


@triton.jit
def _sums(own_ptr, teacher_ptr, own_log, teacher_log, V: tl.constexpr, BLOCK: tl.constexpr):
    """Over the row: the sums of p log q, of p log p, of min(p, q), and of q where q is below p."""
    cross = tl.zeros((), tl.float32)
    entropy = tl.zeros((), tl.float32)
    overlap = tl.zeros((), tl.float32)
    below = tl.zeros((), tl.float32)
    for start in range(0, V, BLOCK):
        log_q = _load(own_ptr, start, V, BLOCK) - own_log
        log_p = _load(teacher_ptr, start, V, BLOCK) - teacher_log
        q, p = tl.exp(log_q), tl.exp(log_p)
        cross += tl.sum(tl.where(p > 0, p * log_q, 0.0), axis=0)
        entropy += tl.sum(tl.where(p > 0, p * log_p, 0.0), axis=0)
        overlap += tl.sum(tl.minimum(p, q), axis=0)
        below += tl.sum(tl.where(q < p, q, 0.0), axis=0)
    return cross, entropy, overlap, below


@triton.jit(do_not_specialize=["eta"])
def _token_loss_kernel(
    logits_ptr,  # [N, V], replaced by the gradient of the loss
    teacher_ptr,  # [M, V] logits
    rows_ptr,  # [N] int64, the teacher's row of each row
    kept_ptr,  # [N] bool; the other rows have loss and gradient 0
    loss_ptr,  # [N] float32
    best_ptr,  # [N] int64, the column of the largest logit
    eta,
    least,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    KIND: tl.constexpr,
):
    await_inputs()
    row = tl.program_id(0).to(tl.int64)
    own_ptr = logits_ptr + row * V
    teacher_ptr += tl.load(rows_ptr + row) * V
    kept = tl.where(tl.load(kept_ptr + row), 1.0, 0.0)
    own_log, best = _log_sum_and_best(own_ptr, V, BLOCK)
    teacher_log, _ = _log_sum_and_best(teacher_ptr, V, BLOCK)
    cross, entropy, overlap, below = _sums(own_ptr, teacher_ptr, own_log, teacher_log, V, BLOCK)
    towards_p = tl.full((), 1.0, tl.float32)  # weights of the two gradients
    towards_overlap = tl.zeros((), tl.float32)
    loss = -cross
    if KIND == "acceptance":
        bounded = tl.maximum(overlap, least)
        loss = -tl.log(bounded)
        towards_p *= 0.0
        towards_overlap += 1 / bounded
    elif KIND == "lk":
        towards_p *= tl.exp(-eta * overlap)
        towards_overlap += 1 - towards_p
        loss = towards_p * (entropy - cross) + towards_overlap * (1 - overlap)
    tl.store(loss_ptr + row, loss * kept)
    tl.store(best_ptr + row, best.to(tl.int64))
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        q = tl.exp(_load(own_ptr, start, V, BLOCK) - own_log)
        p = tl.exp(_load(teacher_ptr, start, V, BLOCK) - teacher_log)
        rise = tl.where(q < p, q, 0.0) - q * below
        slope = (towards_p * (q - p) - towards_overlap * rise) * kept
        tl.store(own_ptr + column, slope.to(logits_ptr.dtype.element_ty), mask=column < V)


def token_loss(
    logits: Tensor,
    teacher: Tensor,
    rows: Tensor,
    kept: Tensor,
    kind: LossKind,
    eta: float,
    least_overlap: float,
) -> tuple[Tensor, Tensor]:
    """The loss of each row, [N] float32, and its likeliest column, [N] int64. `logits` [N, V] are
    replaced by the gradients of the losses.

    Args:
        teacher: [M, V] logits of the target.
        rows: [N] int64, the teacher's row of each row.
        kept: [N] bool; the other rows have loss and gradient 0.
    """
    loss = torch.empty(len(rows), dtype=torch.float32, device=logits.device)
    best = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
    launch(logits, teacher, (rows, kept), (loss, best), kind, (eta, least_overlap)).run()
    return loss, best


def launch(
    logits: Tensor,
    teacher: Tensor,
    inputs: tuple[Tensor, Tensor],
    outputs: tuple[Tensor, Tensor],
    kind: LossKind,
    settings: tuple[float, float],
) -> Launch:
    """Of `token_loss`: `inputs` are rows and kept; `outputs`, loss and best, are written."""
    assert logits.is_contiguous()
    assert teacher.is_contiguous()
    size = logits.shape[1]
    block = min(_LARGEST_BLOCK, triton.next_power_of_2(size))
    names = ("rows_ptr", "kept_ptr", "loss_ptr", "best_ptr", "eta", "least")
    return Launch(
        name=f"training_loss_{kind}[V={size}]",
        kernel=_token_loss_kernel,
        grid=(len(logits),),
        arguments={"logits_ptr": logits, "teacher_ptr": teacher, "V": size, "BLOCK": block}
        | {"KIND": kind, **dict(zip(names, (*inputs, *outputs, *settings), strict=True))},
        num_warps=8 if block >= 2048 else 4,
    )
