"""Keeps the torch settings of one engine from affecting later tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def own_torch_threads() -> Iterator[None]:
    """Building an engine sets torch's number of threads; put it back afterwards."""
    num_threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
