"""Moves inside the paged cache in Triton: all layers in one launch.

Sources and targets may overlap, for this reason. A program owns a range of columns of one page and
carries out all moves there, so no other program reads or writes what it touches. It goes through
the moves in order, a tile of them at a time: all threads load their sources, wait at a barrier,
then store to their targets. Two moves m < n can conflict in three ways:

- n writes what m reads. Within a tile, all loads come before the barrier and all stores after it;
  in different tiles, m's load comes before the barrier of n's tile. So m reads first, as it should.
- n reads what m writes. Callers must not ask for this. The moves of verification never do it: the
  targets of a row ascend and lie at or below their sources (target m < target n <= source n), and
  rows share no slots.
- both write the same slot. Targets differ, for the same reason.

A move of a slot onto itself is skipped, so it never conflicts. A caller whose host does not know
the number of moves passes the largest possible number and pads with moves of a slot onto itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton_launch import WIDEST_LOAD, Launch
from kernels.triton_overlap import await_inputs

_COLUMN_BYTES = 256  # bytes of a slot per program
_TILE_BYTES = 16384  # per tile of moves: 128 bytes per thread
_MAX_TILE = 64  # moves per tile
_WORDS = {8: tl.int64, 4: tl.int32, 2: tl.int16, 1: tl.int8}  # bits are moved, not numbers
# (layers, Hkv, D): SmolLM2, Llama 1B, 8B, 70B over 8 GPUs
_KNOWN_CACHES = ((30, 3, 64), (16, 8, 64), (32, 8, 128), (80, 1, 128))


@triton.jit(do_not_specialize=["M"])  # M changes with every step
def _kv_move_kernel(
    addresses_ptr,  # [pages] int64: where each page begins
    sources_ptr,  # [M] int64 slots
    targets_ptr,  # [M] int64 slots
    M,
    WORD: tl.constexpr,  # integer type
    WIDTH: tl.constexpr,  # words of a slot; slots follow each other without gaps
    TILE: tl.constexpr,  # moves at a time
    COLUMNS: tl.constexpr,
):
    """Program (p, c): columns c * COLUMNS .. of page p, all moves in order."""
    await_inputs()
    page = tl.load(addresses_ptr + tl.program_id(0)).to(tl.pointer_type(WORD))
    page = tl.multiple_of(page, 16)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    for first in range(0, M, TILE):
        move = first + tl.arange(0, TILE)[:, None]
        source = tl.load(sources_ptr + move, mask=move < M, other=0)
        target = tl.load(targets_ptr + move, mask=move < M, other=0)
        moved = (source != target) & (column < WIDTH)
        held = tl.load(page + source * WIDTH + column, mask=moved)
        tl.debug_barrier()  # nothing is overwritten before every thread has read
        tl.store(page + target * WIDTH + column, held, mask=moved)


class KVMove:
    """The operation `kv_move`. The first call with some pages stores their addresses on the device;
    make it before CUDA graph capture, which allows no copy from the host."""

    def __init__(self) -> None:
        self._addresses: dict[tuple[int, ...], Tensor] = {}

    def __call__(self, pages: Sequence[Tensor], sources: Tensor, targets: Tensor) -> None:
        """As the reference: slot targets[m] takes what slot sources[m] holds, in every page.

        Args:
            pages: [num_blocks, S, Hkv, D] each, contiguous, of one shape and dtype, at addresses
                divisible by 16.
            sources, targets: [M] int64 slots. No target is the source of a later move, and no slot
                is the target of two moves. Moves of a slot onto itself are skipped.
        """
        if pages and len(sources):
            _launch(pages, self._table(pages), sources, targets).run()

    def _table(self, pages: Sequence[Tensor]) -> Tensor:
        key = tuple(page.data_ptr() for page in pages)
        if key not in self._addresses:
            self._addresses[key] = torch.tensor(key, dtype=torch.int64, device=pages[0].device)
        return self._addresses[key]


def _launch(pages: Sequence[Tensor], addresses: Tensor, sources: Tensor, targets: Tensor) -> Launch:
    first = pages[0]
    _check(pages, sources, targets)
    slot_bytes = first[0, 0].numel() * first.itemsize
    word_bytes = next(size for size in _WORDS if slot_bytes % size == 0)
    width = slot_bytes // word_bytes
    columns = min(triton.next_power_of_2(width), _COLUMN_BYTES // word_bytes)
    tile = min(_TILE_BYTES // (columns * word_bytes), _MAX_TILE)
    return Launch(
        name=f"kv_move[slot of {slot_bytes} bytes]",
        kernel=_kv_move_kernel,
        grid=(len(pages), triton.cdiv(width, columns)),
        arguments={
            "addresses_ptr": addresses,
            "sources_ptr": sources,
            "targets_ptr": targets,
            "M": len(sources),
            "WORD": _WORDS[word_bytes],
            "WIDTH": width,
            "TILE": tile,
            "COLUMNS": columns,
        },
        num_warps=4,
        min_load_bits=WIDEST_LOAD,
    )


def _check(pages: Sequence[Tensor], *slots: Tensor) -> None:
    for page in pages:
        assert page.is_contiguous()
        assert page.data_ptr() % 16 == 0
        assert (page.shape, page.dtype) == (pages[0].shape, pages[0].dtype)
    for index in slots:
        assert index.dtype == torch.int64
        assert index.is_contiguous()


def launches() -> list[Launch]:
    """What the engine launches, for the caches of the models we know."""
    found = []
    for layers, Hkv, D in _KNOWN_CACHES:
        page = torch.empty(1024, 16, Hkv, D, dtype=torch.bfloat16, device="meta")
        addresses = torch.empty(2 * layers, dtype=torch.int64, device="meta")
        slots = torch.empty(24, dtype=torch.int64, device="meta")
        found.append(_launch([page] * (2 * layers), addresses, slots, slots))
    return found
