"""Tensors that can be read in part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

Index = slice | tuple[slice, ...]


class Stored(Protocol):
    """A tensor of which indexing reads only the indexed part: a view of a file, or a `Tensor`."""

    def __getitem__(self, index: Index, /) -> Tensor: ...


ReadStored = Callable[[str], Stored]  # by Hugging Face name
