"""Launches of the kernels that training uses, for the heads that we know."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.training import triton_attention, triton_loss
from kernels.triton_launch import Launch

_ROWS, _ENTRIES = 40_000, 65_536  # of one batch
_KINDS: tuple[triton_loss.LossKind, ...] = ("cross_entropy", "acceptance", "lk")
_VOCABULARIES = (8192, 32_000, 128_256)  # SmolLM2's head, heads of published targets, no draft ids
_HEADS = ((9, 3, 64), (32, 8, 128))  # SmolLM2, 8B


def launches() -> Iterator[Launch]:
    """All configurations that are compiled for sm_90a in tests."""
    for size in _VOCABULARIES:
        for kind in _KINDS:
            yield _loss(size, kind)
    for heads in _HEADS:
        yield from triton_attention.launches_of(_ROWS, _ENTRIES, *heads)


def _loss(size: int, kind: triton_loss.LossKind) -> Launch:
    logits, rows = _meta(_ROWS, size), _meta(_ROWS, dtype=torch.int64)
    kept, loss = _meta(_ROWS, dtype=torch.bool), _meta(_ROWS, dtype=torch.float32)
    return triton_loss.launch(logits, logits, (rows, kept), (loss, rows), kind, (3.0, 1e-5))


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
