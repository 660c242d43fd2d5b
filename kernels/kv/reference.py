"""Moves inside the paged cache, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def kv_move(pages: Sequence[Tensor], sources: Tensor, targets: Tensor) -> None:
    """Slot targets[m] takes what slot sources[m] holds, in every layer.

    Verification moves accepted nodes to the front: the targets of a row ascend and lie at or below
    their sources, so that no source is overwritten before it is read.

    Args:
        pages: keys and values of all layers, each [num_blocks, S, Hkv, D].
        sources, targets: [M] int64 slots.
    """
    for page in pages:
        slots = page.view(-1, *page.shape[2:])
        slots[targets] = slots[sources]
