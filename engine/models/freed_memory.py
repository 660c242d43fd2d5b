"""Gives memory that loading has freed back to the system. Does nothing without glibc."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1  # of glibc's mallopt
ALONE = 1 << 20  # bytes; while a model is loaded, larger tensors have memory of their own
# Later only tensors of the largest size that glibc knows have: a step would otherwise ask the
# system for every large tensor, and touch all its pages for the first time.
ALONE_IN_STEPS, KEPT_IN_STEPS = 32 << 20, 64 << 20


@contextmanager
def freed_at_once() -> Iterator[None]:
    """While a model is loaded: a large tensor goes back to the system as soon as it is freed, and
    leaves no hole among smaller ones that stay (with the bundled model an engine keeps 80 of 520 MB
    less)."""
    _set(M_MMAP_THRESHOLD, ALONE)
    try:
        yield
    finally:
        _set(M_MMAP_THRESHOLD, ALONE_IN_STEPS)
        _set(M_TRIM_THRESHOLD, KEPT_IN_STEPS)
        return_freed_memory()


def return_freed_memory() -> None:
    """Give free pages between what is in use back to the system."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _set(parameter: int, value: int) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(parameter, value)
