"""From edited logits to one token per row in Triton, as `reference.draw`, without a sort.

There are two kinds of passes over tiles of the vocabulary, one program per (tile, row):

1. draw: find the arg-max with noise over ALL tokens, and the mass of each tile.
2. verify: do the filters keep the drawn token? That needs only the mass above its own logit. For
   the case that they do not, the same pass draws again among the tokens above it: any token that
   the filters keep lies above any that they reject. Finished rows, and tiles whose highest logit
   is too low, are not read. The filters reject a draw with probability about 1 - top_p, the mass
   that they cut off, so few rows need a second and third verification; `finish` repeats them until
   no row is left.

For rows with top-k, histograms of the bits find the k-th highest logit between 1 and 2, digit by
digit; these rows then draw among the tokens from that logit up.
A row's result does not depend on other rows: tiles are cut the same way for every batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from kernels.sampling.draw import triton_draw_kernels as kernels
from kernels.sampling.settings import DrawSettings
from kernels.triton_launch import WIDEST_LOAD, Launch

TILE = 2048  # tokens of one program
_VERIFICATIONS = 3  # passes by many programs before one program per row finishes
_DIGITS = ((21, 11), (10, 11), (0, 10))  # (shift, bits) of a float's digits, the highest first


def draw(logits: Tensor, settings: DrawSettings, tile: int = TILE) -> Tensor:
    """As the reference: logits [R, V] float32 -> [R] int64 tokens. NaN counts as -inf."""
    work = _Work.of(logits, settings, tile)
    for launch in work.launches():
        launch.run()
    return work.drawn


@dataclass(frozen=True, slots=True)
class _Work:
    """Buffers and launches of one batch."""

    V: int
    grid: tuple[int, int]  # (tiles, R)
    tile: int
    settings: DrawSettings
    drawn: Tensor  # [R] int64
    state: Tensor  # [R, STATE_SIZE] int32, see triton_draw_kernels
    tile_inputs: dict[str, Any]
    tile_results: dict[str, Any]
    row_inputs: dict[str, Any]

    @classmethod
    def of(cls, logits: Tensor, settings: DrawSettings, tile: int) -> _Work:
        R, V = logits.shape
        num_tiles = triton.cdiv(V, tile)
        min_p = settings.min_p
        floats = torch.empty(4, R, num_tiles, dtype=torch.float32, device=logits.device)
        names = ("highest_ptr", "scores_ptr", "values_ptr", "masses_ptr")
        return cls(
            V=V,
            grid=(num_tiles, R),
            tile=tile,
            settings=settings,
            drawn=torch.empty(R, dtype=torch.int64, device=logits.device),
            state=torch.empty(R, kernels.STATE_SIZE, dtype=torch.int32, device=logits.device),
            tile_inputs=_tile_inputs(logits, settings),
            tile_results=dict(zip(names, floats.unbind(), strict=True))
            | {"tokens_ptr": torch.empty(R, num_tiles, dtype=torch.int32, device=logits.device)},
            row_inputs={
                "top_k_ptr": settings.top_k,
                "top_p_ptr": settings.top_p,
                "log_min_p_ptr": None if min_p is None else min_p.log(),
            },
        )

    def launches(self) -> Iterator[Launch]:
        yield self._draw(first=True)
        yield self._decide(first=True)
        if not self.settings.is_filtered:
            return
        if self.settings.top_k is not None:
            yield from self._top_k_launches()
        for _ in range(_VERIFICATIONS):
            yield self._draw(first=False)
            yield self._decide(first=False)
        yield self._finish()

    def _name(self, step: str) -> str:
        settings = self.settings
        parts = {"k": settings.top_k, "p": settings.top_p, "m": settings.min_p}
        filters = "".join(letter for letter, part in parts.items() if part is not None)
        masked = ", masked" if settings.allowed is not None else ""
        return f"draw.{step}[V={self.V}, filters={filters}{masked}]"

    def _draw(self, first: bool) -> Launch:
        return Launch(
            name=self._name("first" if first else "again"),
            kernel=kernels.draw_kernel,
            grid=self.grid,
            arguments=self.tile_inputs
            | self.tile_results
            | {"state_ptr": self.state, "FIRST": first, "TILE": self.tile},
            min_load_bits=WIDEST_LOAD,
        )

    def _decide(self, first: bool) -> Launch:
        return Launch(
            name=self._name("decide_first" if first else "decide"),
            kernel=kernels.decide_kernel,
            grid=(self.grid[1],),
            arguments=self.row_inputs
            | self.tile_results
            | {
                "state_ptr": self.state,
                "drawn_ptr": self.drawn,
                "temperature_ptr": self.settings.temperature,
                "V": self.V,
                "num_tiles": self.grid[0],
                "FIRST": first,
                "TILES": triton.next_power_of_2(self.grid[0]),
            },
        )

    def _finish(self) -> Launch:
        return Launch(
            name=self._name("finish"),
            kernel=kernels.finish_kernel,
            grid=(self.grid[1],),
            arguments=self.tile_inputs
            | self.row_inputs
            | self.tile_results
            | {
                "state_ptr": self.state,
                "drawn_ptr": self.drawn,
                "num_tiles": self.grid[0],
                "TILE": self.tile,
                "TILES": triton.next_power_of_2(self.grid[0]),
            },
        )

    def _top_k_launches(self) -> Iterator[Launch]:
        R, device = self.grid[1], self.state.device
        counts = torch.zeros(len(_DIGITS), R, kernels.BINS, dtype=torch.int32, device=device)
        unused = ("seeds_ptr", "positions_ptr")
        inputs = {name: at for name, at in self.tile_inputs.items() if name not in unused}
        for (shift, bits), found in zip(_DIGITS, counts, strict=True):
            digit = {"state_ptr": self.state, "counts_ptr": found, "SHIFT": shift, "BITS": bits}
            yield Launch(
                name=self._name(f"count_digits_{shift}"),
                kernel=kernels.count_digits_kernel,
                grid=self.grid,
                arguments=inputs
                | digit
                | {"highest_ptr": self.tile_results["highest_ptr"], "TILE": self.tile},
                min_load_bits=WIDEST_LOAD,
            )
            yield Launch(
                name=self._name(f"choose_digit_{shift}"),
                kernel=kernels.choose_digit_kernel,
                grid=(R,),
                arguments=digit,
            )


def example_launches(logits: Tensor) -> list[Launch]:
    """Launches for compile checks, over `logits` [R, V] of the meta device: batches that use
    everything, top-p alone, all filters, and no filter."""
    R, V = logits.shape

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    row, whole = new(R), new(R, dtype=torch.int64)
    mask = new(R, triton.cdiv(V, 32), dtype=torch.int32)
    batches = (
        DrawSettings(row, whole, whole, whole, row, row, mask),
        DrawSettings(row, whole, whole, top_p=row),
        DrawSettings(row, whole, whole, whole, row, row),
        DrawSettings(row, whole, whole),
    )
    found = [launch for chosen in batches for launch in _Work.of(logits, chosen, TILE).launches()]
    return list({launch.name: launch for launch in found}.values())


def _tile_inputs(logits: Tensor, settings: DrawSettings) -> dict[str, Any]:
    """What kernels that read a tile of the logits need."""
    allowed = settings.allowed
    assert logits.dtype == torch.float32
    assert logits.stride(1) == 1
    assert allowed is None or allowed.stride(1) == 1
    return {
        "logits_ptr": logits,
        "allowed_ptr": allowed,
        "temperature_ptr": settings.temperature,
        "seeds_ptr": settings.seeds,
        "positions_ptr": settings.positions,
        "logits_stride": logits.stride(0),
        "allowed_stride": 0 if allowed is None else allowed.stride(0),
        "V": logits.shape[1],
    }
