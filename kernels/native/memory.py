"""Memory for weights in huge pages.

Every token reads all weights once. With pages of 4 KiB the hardware stops reading ahead at every
page border, and looking up addresses takes much of the time: on a virtual machine with two Zen 4
cores, 24-28 GB/s were read from small pages and 46-50 GB/s from pages of 2 MiB. Where the system
has no huge pages, or does not give any, the same memory comes in small ones.
"""

from __future__ import annotations

import ctypes
import mmap
from math import prod

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20
CHUNK = 32 << 20  # most tensors are smaller than a huge page, so they share chunks
LINE = 64  # every tensor begins at a cache line


class HugePages:
    """Gives out tensors. A chunk is returned to the system with the last tensor in it."""

    def __init__(self) -> None:
        self._chunk = torch.empty(0, dtype=torch.uint8)

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """A tensor that is not initialised; it begins at a cache line."""
        size = prod(shape) * dtype.itemsize
        if size > len(self._chunk):
            chunk = _mapped(max(size, CHUNK))
            if size > CHUNK:
                return chunk[:size].view(dtype).view(shape)
            self._chunk = chunk
        taken, self._chunk = self._chunk[:size], self._chunk[-(-size // LINE) * LINE :]
        return taken.view(dtype).view(shape)


def _mapped(size: int) -> Tensor:
    """Bytes of new memory that begin at the border of a huge page."""
    memory = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    start = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % HUGE_PAGE
    return torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=start)
