"""Tensors that are read in part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

Index = slice | tuple[slice, ...]


class Stored(Protocol):
    """A tensor that indexing reads, as far as the index asks: a view of a file, or a `Tensor`."""

    def __getitem__(self, index: Index, /) -> Tensor: ...


ReadStored = Callable[[str], Stored]  # by Hugging Face name
