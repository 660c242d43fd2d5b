"""The order of rotary pairs in stored weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.checkpoints.stored import Index, Stored
from kernels.linear.quantised import Part


@dataclass(frozen=True, slots=True)
class PairedRows:
    """Rows of queries or keys that are stored with neighbouring rotary pairs, in the order of our
    kernels. Only whole heads may be read."""

    stored: Stored
    head_dim: int

    def __getitem__(self, index: Index, /) -> Part:
        part = self.stored[index]
        num_heads = len(part) // self.head_dim
        if isinstance(part, Tensor):
            return undo_rotary_permutation(part, num_heads)
        return part.take(undo_rotary_permutation(torch.arange(len(part)), num_heads))


def undo_rotary_permutation(tensor: Tensor, num_heads: int) -> Tensor:
    """GGUF files and Llama 4 store the rows of q and k so that rotary pairs are neighbours
    (2i, 2i + 1); other models, and our kernels, pair row i with row i + D/2 of the same head.
    [Hq D, ...] -> the same shape."""
    pairs = tensor.reshape(num_heads, -1, 2, *tensor.shape[1:])  # [Hq, D / 2, 2, ...]
    return pairs.transpose(1, 2).reshape(tensor.shape)
