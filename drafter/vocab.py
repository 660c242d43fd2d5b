"""The map from a head's draft vocabulary to the target's, as EAGLE-3 heads store it: `d2t` holds
target id minus draft id, `t2d` marks the target ids in the draft vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor


def target_ids_of(d2t: Tensor, vocab_size: int) -> Tensor:
    """Offsets [Vd] -> target ids [Vd] int64. ValueError unless they are distinct ids of the
    target's `vocab_size` tokens."""
    ids = d2t.long() + torch.arange(len(d2t), device=d2t.device)
    outside = ((ids < 0) | (ids >= vocab_size)).nonzero()
    if len(outside):
        draft = int(outside[0])
        raise ValueError(
            f"d2t maps draft id {draft} to {int(ids[draft])}; "
            f"the target's ids are 0 to {vocab_size - 1}"
        )
    repeated = (ids.bincount(minlength=vocab_size) > 1).nonzero()
    if len(repeated):
        raise ValueError(f"d2t maps several draft ids to {int(repeated[0])}")
    return ids


def offsets_of(target_ids: Tensor) -> Tensor:
    """Target ids [Vd] -> `d2t` [Vd] int64."""
    return target_ids - torch.arange(len(target_ids), device=target_ids.device)


def mask_of(target_ids: Tensor, vocab_size: int) -> Tensor:
    """Target ids [Vd] -> `t2d` [V] bool."""
    mask = torch.zeros(vocab_size, dtype=torch.bool, device=target_ids.device)
    mask[target_ids] = True
    return mask


def check_mask(t2d: Tensor, target_ids: Tensor) -> None:
    """ValueError unless `t2d` [V] marks exactly `target_ids`."""
    wrong = (t2d.bool() != mask_of(target_ids, len(t2d))).nonzero()
    if len(wrong):
        token = int(wrong[0])
        marked = "marks" if t2d[token] else "does not mark"
        named = "does not map to it" if t2d[token] else "does"
        raise ValueError(f"t2d {marked} target id {token}, d2t {named} ({len(wrong)} such ids)")


def is_identity(target_ids: Tensor, vocab_size: int) -> bool:
    """Whether every draft id equals its target id, and the vocabularies have the same size."""

    return len(target_ids) == vocab_size and not offsets_of(target_ids).any()
