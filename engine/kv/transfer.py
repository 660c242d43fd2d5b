"""How pages of the cache come from the engine that computes a prompt to the one that decodes it."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor


class KVTransfer(Protocol):
    """Carries whole blocks between engines with equal pages. Peers are engines of the other role,
    by number.

    A place belongs to the block of the receiver that has its number, and to one sender: the
    receiver names it (`Reserved`) before anything is sent, and names it again only after the sender
    was told that the sequence has ended. So no place is written for two sequences at a time. Both
    calls return when their bytes are read: `send` may be announced, and blocks may be reused.
    """

    @property
    def endpoint(self) -> bytes:
        """How senders reach the places of this engine; it goes to them with `Reserved`."""
        ...

    def send(
        self, peer: int, blocks: Sequence[int], places: Sequence[int], endpoint: bytes
    ) -> None:
        """Put the pages of own blocks into places of this peer, in order. ConnectionError if it
        cannot be reached at its `endpoint`: then nothing more is written there."""
        ...

    def receive(self, peer: int, blocks: Sequence[int]) -> None:
        """Take what this peer has put into the places of these blocks."""
        ...


class BlockPages:
    """All that belongs to a block, as one row of bytes."""

    def __init__(self, pages: Sequence[Tensor]) -> None:
        """`pages`: each tensor [num_blocks, ...]."""
        self._pages = [page.flatten(1).view(torch.uint8) for page in pages]
        self.width = sum(page.shape[1] for page in self._pages)

    def copy_out(self, blocks: Sequence[int], rows: Tensor, at: Sequence[int]) -> None:
        """Put blocks into these of the `rows` [N, width] in host memory, in order."""
        for column, page in self._columns():
            rows[list(at), column] = page[list(blocks)].cpu()

    def copy_in(self, blocks: Sequence[int], rows: Tensor, at: Sequence[int]) -> None:
        """Take blocks from these rows."""
        for column, page in self._columns():
            page[list(blocks)] = rows[list(at), column].to(page.device)

    def _columns(self) -> Iterator[tuple[slice, Tensor]]:
        """The bytes of a row that belong to a page tensor, and this tensor."""
        first = 0
        for page in self._pages:
            yield slice(first, first + page.shape[1]), page
            first += page.shape[1]


class SharedMemory:
    """`KVTransfer` between processes of one machine: an area of memory for each pair of engines,
    open in both. Only places that were used take memory."""

    endpoint = b""  # an area needs no address

    def __init__(self, pages: Sequence[Tensor], areas: Mapping[int, int], num_places: int) -> None:
        """`pages`: as for `BlockPages`. `areas`: handles of memory files, by peer. `num_places`:
        blocks that this engine receives into; 0 for one that sends only."""
        self._pages = BlockPages(pages)
        self._areas = areas
        self._views: dict[int, Tensor] = {}  # [num_places, bytes of a block]
        for peer, area in areas.items():
            needed = num_places * self._pages.width
            if os.fstat(area).st_size < needed:
                os.ftruncate(area, needed)
            if num_places:
                self._views[peer] = self._view(peer)

    def send(
        self,
        peer: int,
        blocks: Sequence[int],
        places: Sequence[int],
        endpoint: bytes,  # noqa: ARG002
    ) -> None:
        there = self._views.get(peer)
        if there is None or max(places) >= len(there):  # the receiver started again with more
            there = self._views[peer] = self._view(peer)
        self._pages.copy_out(blocks, there, places)

    def receive(self, peer: int, blocks: Sequence[int]) -> None:
        self._pages.copy_in(blocks, self._views[peer], blocks)

    def _view(self, peer: int) -> Tensor:
        area, width = self._areas[peer], self._pages.width
        size = os.fstat(area).st_size // width * width
        return torch.frombuffer(mmap.mmap(area, size), dtype=torch.uint8).view(-1, width)
