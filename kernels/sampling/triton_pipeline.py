"""From logits to one token per row in Triton, as `pipeline_reference.draw`, without a sort.

Passes, each over tiles of the vocabulary, one program per (tile, row):

1. raw sums: highest logit, sum of exponentials and best tokens of each tile (for logprobs only);
2. edit: penalties and bias are scattered into the logits in place, the raw values kept aside;
3. draw: the arg-max with noise over ALL tokens, the mass of each tile;
4. verify: is the drawn token inside the filters? That needs only the mass above its own logit. The
   same pass draws anew among the tokens above it, in case it was not: all tokens that the filters
   keep lie above one that they do not. Rows that are done and tiles whose highest logit is too low
   are not read. A draw is turned down with the probability of what the filters cut off, about
   1 - top_p, so a second and third verification finds few rows; `finish` repeats it until no row
   is left.
5. undo: the raw logits are put back.

Of rows with top-k the k-th highest logit is found between 3 and 4, digit by digit, from histograms
of the bits; they draw among the tokens above it.
A row's result does not depend on other rows: tiles are cut the same way for every batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from kernels.sampling import triton_steps as steps
from kernels.sampling.pipeline_reference import Drawn, DrawSettings, LogitEdits
from kernels.sampling.triton_sums import new_sums, sums_launch
from kernels.triton_launch import WIDEST_LOAD, Launch

TILE = 2048  # tokens of one program
MAX_TOP = 32  # logprobs of so many tokens can be asked for
_VERIFICATIONS = 3  # passes by many programs before one program per row finishes
_EDIT_PROGRAMS = 8  # per row
_EDIT_BLOCK = 256
_DIGITS = ((21, 11), (10, 11), (0, 10))  # (shift, bits) of a float's digits, the highest first


def draw(
    logits: Tensor, settings: DrawSettings, num_top: int | None = None, tile: int = TILE
) -> Drawn:
    """As the reference. `logits` [R, V] float32 are changed while this runs, and are as before
    when it ends. NaN counts as -inf."""
    drawn = _new_drawn(logits, num_top)
    for launch in _launches(logits, settings, drawn, tile):
        launch.run()
    return drawn


def draw_tokens(logits: Tensor, settings: DrawSettings) -> Tensor:
    """The operation `draw`: [R] int64 tokens."""
    return draw(logits, settings).tokens


def _new_drawn(logits: Tensor, num_top: int | None) -> Drawn:
    R, device = logits.shape[0], logits.device
    tokens = torch.empty(R, dtype=torch.int64, device=device)
    if num_top is None:
        return Drawn(tokens, None, None, None)
    assert num_top <= MAX_TOP, f"{num_top} logprobs, at most {MAX_TOP}"
    logprobs = torch.empty(R, dtype=torch.float32, device=device)
    if num_top == 0:
        return Drawn(tokens, logprobs, None, None)
    top_ids = torch.empty(R, num_top, dtype=torch.int64, device=device)
    return Drawn(tokens, logprobs, top_ids, torch.empty_like(top_ids, dtype=torch.float32))


def _launches(logits: Tensor, settings: DrawSettings, drawn: Drawn, tile: int) -> Iterator[Launch]:
    assert logits.dtype == torch.float32
    assert logits.stride(1) == 1
    num_top = 0 if drawn.top_ids is None else drawn.top_ids.shape[1]
    sums = new_sums(logits, tile, num_top)
    if drawn.logprobs is not None:
        yield sums_launch(logits, sums, tile, num_top)
    raw = None if settings.edits is None else torch.empty_like(settings.edits.bias)
    if settings.edits is not None and raw is not None:
        yield _edit_launch(logits, settings.edits, raw, restore=False)
    work = _Work.of(logits, settings, tile)
    yield from work.launches()
    if settings.edits is not None and raw is not None:
        yield _edit_launch(logits, settings.edits, raw, restore=True)
    yield _report_launch(logits, work, sums, drawn, num_top)


@dataclass(frozen=True, slots=True)
class _Work:
    """One batch on its way from edited logits to tokens."""

    V: int
    grid: tuple[int, int]  # (tiles, R)
    tile: int
    settings: DrawSettings
    state: Tensor  # [R, STATE_SIZE] int32, see triton_steps
    tile_inputs: dict[str, Any]
    tile_results: dict[str, Any]
    row_inputs: dict[str, Any]

    @classmethod
    def of(cls, logits: Tensor, settings: DrawSettings, tile: int) -> _Work:
        R, V = logits.shape
        num_tiles = triton.cdiv(V, tile)
        allowed, min_p = settings.allowed, settings.min_p
        assert allowed is None or allowed.stride(1) == 1
        floats = torch.empty(4, R, num_tiles, dtype=torch.float32, device=logits.device)
        names = ("highest_ptr", "scores_ptr", "values_ptr", "masses_ptr")
        return cls(
            V=V,
            grid=(num_tiles, R),
            tile=tile,
            settings=settings,
            state=torch.empty(R, steps.STATE_SIZE, dtype=torch.int32, device=logits.device),
            tile_inputs={
                "logits_ptr": logits,
                "allowed_ptr": allowed,
                "temperature_ptr": settings.temperature,
                "seeds_ptr": settings.seeds,
                "positions_ptr": settings.positions,
                "logits_stride": logits.stride(0),
                "allowed_stride": 0 if allowed is None else allowed.stride(0),
                "V": V,
            },
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
            kernel=steps.draw_kernel,
            grid=self.grid,
            arguments=self.tile_inputs
            | self.tile_results
            | {"state_ptr": self.state, "FIRST": first, "TILE": self.tile},
            min_load_bits=WIDEST_LOAD,
        )

    def _decide(self, first: bool) -> Launch:
        return Launch(
            name=self._name("decide_first" if first else "decide"),
            kernel=steps.decide_kernel,
            grid=(self.grid[1],),
            arguments=self.row_inputs
            | self.tile_results
            | {
                "state_ptr": self.state,
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
            kernel=steps.finish_kernel,
            grid=(self.grid[1],),
            arguments=self.tile_inputs
            | self.row_inputs
            | self.tile_results
            | {
                "state_ptr": self.state,
                "num_tiles": self.grid[0],
                "TILE": self.tile,
                "TILES": triton.next_power_of_2(self.grid[0]),
            },
        )

    def _top_k_launches(self) -> Iterator[Launch]:
        R, device = self.grid[1], self.state.device
        counts = torch.zeros(len(_DIGITS), R, steps.BINS, dtype=torch.int32, device=device)
        unused = ("seeds_ptr", "positions_ptr")
        inputs = {name: at for name, at in self.tile_inputs.items() if name not in unused}
        for (shift, bits), found in zip(_DIGITS, counts, strict=True):
            digit = {"state_ptr": self.state, "counts_ptr": found, "SHIFT": shift, "BITS": bits}
            yield Launch(
                name=self._name(f"count_digits_{shift}"),
                kernel=steps.count_digits_kernel,
                grid=self.grid,
                arguments=inputs
                | digit
                | {"highest_ptr": self.tile_results["highest_ptr"], "TILE": self.tile},
                min_load_bits=WIDEST_LOAD,
            )
            yield Launch(
                name=self._name(f"choose_digit_{shift}"),
                kernel=steps.choose_digit_kernel,
                grid=(R,),
                arguments=digit,
            )


def _edit_launch(logits: Tensor, edits: LogitEdits, raw: Tensor, restore: bool) -> Launch:
    return Launch(
        name=f"edit.{'undo' if restore else 'do'}[V={logits.shape[1]}]",
        kernel=steps.edit_kernel,
        grid=(_EDIT_PROGRAMS, logits.shape[0]),
        arguments={
            "logits_ptr": logits,
            "offsets_ptr": edits.offsets,
            "ids_ptr": edits.ids,
            "counts_ptr": edits.counts,
            "bias_ptr": edits.bias,
            "repetition_ptr": edits.repetition,
            "frequency_ptr": edits.frequency,
            "presence_ptr": edits.presence,
            "raw_ptr": raw,
            "logits_stride": logits.stride(0),
            "RESTORE": restore,
            "BLOCK": _EDIT_BLOCK,
        },
    )


def _report_launch(
    logits: Tensor, work: _Work, sums: dict[str, Any], drawn: Drawn, num_top: int
) -> Launch:
    num_tiles, R = work.grid
    return Launch(
        name=f"report[V={work.V}, logprobs={drawn.logprobs is not None}, top={num_top}]",
        kernel=steps.report_kernel,
        grid=(R,),
        arguments=sums
        | {
            "logits_ptr": logits,
            "state_ptr": work.state,
            "drawn_ptr": drawn.tokens,
            "logprobs_ptr": drawn.logprobs,
            "top_ids_ptr": drawn.top_ids,
            "top_logprobs_ptr": drawn.top_logprobs,
            "logits_stride": logits.stride(0),
            "num_tiles": num_tiles,
            "num_top": num_top,
            "TILES": triton.next_power_of_2(num_tiles),
            "CANDIDATES": triton.next_power_of_2(max(num_tiles * num_top, 1)),
        },
    )


def example_launches(logits: Tensor) -> list[Launch]:
    """Those of a batch that uses everything, of one with top-p alone, and of decode rounds with and
    without filters, for compile checks."""
    R, V = logits.shape

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    row, whole = new(R), new(R, dtype=torch.int64)
    entries = new(4096, dtype=torch.int32)
    offsets = new(R + 1, dtype=torch.int32)
    edits = LogitEdits(offsets, entries, entries, new(4096), row, row, row)
    mask = new(R, triton.cdiv(V, 32), dtype=torch.int32)
    everything = DrawSettings(row, whole, whole, whole, row, row, edits, mask)
    top_p = DrawSettings(row, whole, whole, top_p=row)
    found = [*_launches(logits, everything, _new_drawn(logits, 20), TILE)]
    rounds = DrawSettings(row, whole, whole), DrawSettings(row, whole, whole, whole, row, row)
    for settings in (top_p, *rounds):
        found += _launches(logits, settings, _new_drawn(logits, None), TILE)
    return list({launch.name: launch for launch in found}.values())
