"""Moves inside the paged cache, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.linear.scaled import FP8, LARGEST


def kv_move(pages: Sequence[Tensor], sources: Tensor, targets: Tensor) -> None:
    """Slot targets[m] takes what slot sources[m] holds, in every layer.

    Verification moves accepted nodes to the front: the targets of a row ascend and lie at or below
    their sources, so that no source is overwritten before it is read.

    Args:
        pages: keys and values of all layers, each [num_blocks, S, Hkv, D].
        sources, targets: [M] int64 slots.
    """
    for page in pages:
        slots = slots_of(page)
        slots[targets] = slots[sources]


def slots_of(page: Tensor) -> Tensor:
    """A page [num_blocks, S, Hkv, D] as slots, [num_blocks * S, Hkv, D]."""
    return bits(page).view(-1, *page.shape[2:])


def bits(x: Tensor) -> Tensor:
    """FP8 numbers as bytes, because torch cannot index them everywhere; others as they are."""
    return x.view(torch.uint8) if x.dtype is FP8 else x


def as_kept(x: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Keys or values as numbers of a cache. In FP8 they are divided by their scale, and what does
    not fit becomes the largest number."""
    if dtype is not FP8:
        return x.to(dtype)
    return (x.float() * (1.0 / scale)).clamp(-LARGEST, LARGEST).to(FP8)
