"""Tensors that can be read in part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from kernels.linear.grouped import GroupedWeight

Index = slice | tuple[slice, ...]


class Stored(Protocol):
    """A tensor of which indexing reads only the indexed part: a view of a file, a `Tensor`, or
    a `GroupedWeight`."""

    def __getitem__(self, index: Index, /) -> Tensor | GroupedWeight: ...


ReadStored = Callable[[str], Stored]  # by Hugging Face name
