"""What computes a head's attention and losses while it is trained: plain torch, or Triton kernels
on a GPU, which read texts that lie one after the other, without padding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from drafter.train.head import losses
from drafter.train.head.losses import RowLoss, TokenLoss
from drafter.train.head.network import Attend, StepKeys, attend


@dataclass(frozen=True, slots=True)
class HeadKernels:
    """One choice for a whole run."""

    name: str  # for the log
    packed: bool  # texts of a batch lie one after the other; else side by side, padded
    attend: Attend
    losses: RowLoss


IN_TORCH = HeadKernels("plain torch", packed=False, attend=attend, losses=losses.IN_TORCH)


def choose_kernels(
    fused: Literal["auto", "off"], device: torch.device, loss: TokenLoss
) -> HeadKernels:
    """auto: Triton on CUDA, torch elsewhere."""
    return in_triton(loss) if fused == "auto" and device.type == "cuda" else IN_TORCH


def in_triton(loss: TokenLoss) -> HeadKernels:
    """Triton kernels; the loss `top_k` has none, and stays in torch."""
    from kernels.training import triton_attention

    def attend_in_triton(queries: Tensor, seen: StepKeys) -> Tensor:
        found: Tensor = triton_attention.attention(
            queries, seen.keys, seen.values, seen.later, seen.first, seen.last
        )
        return found.flatten(2)

    if loss.kind == "top_k":
        return HeadKernels("attention in Triton", True, attend_in_triton, losses.IN_TORCH)
    by = RowLoss(_teacher_logits, _losses_in_triton)
    return HeadKernels("attention and losses in Triton", True, attend_in_triton, by)


def _teacher_logits(hidden: Tensor, head: Tensor, dtype: torch.dtype) -> Tensor:
    """[N, V]: the kernel takes their softmax itself, each time that it reads them."""
    return hidden.to(dtype) @ head.to(dtype).T


def _losses_in_triton(
    logits: Tensor, teacher: Tensor, rows: Tensor, kept: Tensor, kind: TokenLoss
) -> tuple[Tensor, Tensor]:
    from kernels.training import triton_loss

    assert kind.kind != "top_k"
    found: tuple[Tensor, Tensor] = triton_loss.token_loss(
        logits, teacher, rows, kept, kind.kind, kind.eta, losses.LEAST_OVERLAP
    )
    return found
