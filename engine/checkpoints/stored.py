"""Tensors that can be read in part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from kernels.linear.quantised import Part

Index = slice | tuple[slice, ...]
Bounds = tuple[int, int]


class Stored(Protocol):
    """A tensor of which indexing reads only the indexed part: a view of a file, a `Tensor`, or
    a quantised weight."""

    def __getitem__(self, index: Index, /) -> Part: ...


class View(Protocol):
    """A tensor in a safetensors file."""

    def get_shape(self) -> list[int]: ...

    def get_dtype(self) -> str: ...

    def __getitem__(self, index: Any, /) -> Any: ...


FLOATS = ("F32", "F16", "BF16")  # as safetensors call them


def require_matrix(view: View, name: str) -> None:
    """ValueError unless it has two axes."""
    if len(view.get_shape()) != 2:
        raise ValueError(f"tensor {name} has shape {view.get_shape()}; it needs two axes")


def require_dtype(view: View, name: str, allowed: Sequence[str]) -> None:
    if view.get_dtype() not in allowed:
        raise ValueError(f"tensor {name} is {view.get_dtype()}; it must be {' or '.join(allowed)}")


ReadStored = Callable[[str], Stored]  # by Hugging Face name


def bounds(index: Index, shape: Sequence[int]) -> tuple[Bounds, Bounds]:
    """The first row and column of an index, and those after the last one."""
    rows, columns = index if isinstance(index, tuple) else (index, slice(None))
    (top, bottom, _), (left, right, _) = rows.indices(shape[0]), columns.indices(shape[1])
    return (top, bottom), (left, right)
