"""Penalties and bias in Triton, as `reference.edit_logits`.

One pass over all tokens of all rows, one program per (tile, row), copies the logits and penalises
the tokens that were seen. Counts are read only for rows with penalties. A second, small launch adds
the bias entries, atomically, because a token may have two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.sampling.settings import BiasEntries, LogitEdits, Penalties
from kernels.triton_launch import WIDEST_LOAD, Launch
from kernels.triton_overlap import await_inputs

TILE = 2048  # tokens of one program
_ENTRIES = 128  # bias entries of one program


@triton.jit
def _penalise_kernel(
    logits_ptr,  # [R, V] float32, rows logits_stride apart
    out_ptr,  # [R, V] float32 out, contiguous
    counts_ptr,  # [L, V] int32, rows counts_stride apart
    lines_ptr,  # [R] int64
    paths_ptr,  # [R, D] int64, rows paths_stride apart
    repetition_ptr,  # [R] float32, and so are the next two
    frequency_ptr,
    presence_ptr,
    logits_stride,
    counts_stride,
    paths_stride,
    V,
    D,
    TILE: tl.constexpr,
):
    """One tile of one row, grid (tiles, R)."""
    await_inputs()
    tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    ids = tile * TILE + tl.arange(0, TILE)
    inside = ids < V
    values = tl.load(logits_ptr + row * logits_stride + ids, mask=inside, other=0.0)
    repetition = tl.load(repetition_ptr + row)
    frequency = tl.load(frequency_ptr + row)
    presence = tl.load(presence_ptr + row)
    if (repetition != 1.0) | (frequency != 0.0) | (presence != 0.0):
        line = tl.load(lines_ptr + row)
        seen = tl.load(counts_ptr + line * counts_stride + ids, mask=inside, other=0)
        for place in range(D):
            token = tl.load(paths_ptr + row * paths_stride + place).to(tl.int32)
            seen += tl.where(ids == token, 2, 0)
        counts = seen >> 1
        changed = tl.where(values > 0.0, tl.div_rn(values, repetition), values * repetition)
        # A float64 product is exact; converting it rounds it before the subtraction.
        changed -= (counts.to(tl.float64) * frequency.to(tl.float64)).to(tl.float32)
        changed -= tl.where(counts > 0, presence, 0.0)
        values = tl.where(seen > 0, changed, values)
    tl.store(out_ptr + row * V + ids, values, mask=inside)


@triton.jit
def _bias_kernel(
    edited_ptr,  # [R, V] float32 contiguous, changed in place
    positions_ptr,  # [R] int64
    lists_ptr,  # [R] int64
    ids_ptr,  # [B, M] int64 contiguous, and so are the next two
    values_ptr,  # float32
    until_ptr,  # int64
    V,
    M,
    ENTRIES: tl.constexpr,
):
    """Some entries of one row, grid (ceil(M / ENTRIES), R)."""
    await_inputs()
    row = tl.program_id(1).to(tl.int64)
    entries = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    inside = entries < M
    at = tl.load(lists_ptr + row) * M + entries
    ids = tl.load(ids_ptr + at, mask=inside, other=-1)
    until = tl.load(until_ptr + at, mask=inside, other=0)
    applies = inside & (ids >= 0) & (tl.load(positions_ptr + row) < until)
    values = tl.load(values_ptr + at, mask=applies, other=0.0)
    tl.atomic_add(edited_ptr + row * V + ids, values, mask=applies, sem="relaxed")


def edit_logits(logits: Tensor, edits: LogitEdits, tile: int = TILE) -> Tensor:
    """As the reference: a changed copy of the logits [R, V] float32, contiguous."""
    if edits.penalties is None:
        edited = logits.clone(memory_format=torch.contiguous_format)
    else:
        edited = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
        _penalise_launch(logits, edits.penalties, edited, tile).run()
    if edits.bias is not None:
        _bias_launch(edited, edits.positions, edits.bias).run()
    return edited


def _penalise_launch(logits: Tensor, penalties: Penalties, edited: Tensor, tile: int) -> Launch:
    R, V = logits.shape
    counts, paths = penalties.counts, penalties.paths
    assert logits.dtype == torch.float32
    assert counts.dtype == torch.int32
    assert all(part.stride(1) == 1 for part in (logits, counts))
    assert paths.shape[1] < 2 or paths.stride(1) == 1
    return Launch(
        name=f"edit.penalise[V={V}]",
        kernel=_penalise_kernel,
        grid=(triton.cdiv(V, tile), R),
        arguments={
            "logits_ptr": logits,
            "out_ptr": edited,
            "counts_ptr": counts,
            "lines_ptr": penalties.lines,
            "paths_ptr": paths,
            "repetition_ptr": penalties.repetition,
            "frequency_ptr": penalties.frequency,
            "presence_ptr": penalties.presence,
            "logits_stride": logits.stride(0),
            "counts_stride": counts.stride(0),
            "paths_stride": paths.stride(0),
            "V": V,
            "D": paths.shape[1],
            "TILE": tile,
        },
        min_load_bits=WIDEST_LOAD,
    )


def _bias_launch(edited: Tensor, positions: Tensor, bias: BiasEntries) -> Launch:
    R, V = edited.shape
    M = bias.ids.shape[1]
    assert all(part.is_contiguous() for part in (edited, bias.ids, bias.values, bias.until))
    return Launch(
        name=f"edit.bias[V={V}]",
        kernel=_bias_kernel,
        grid=(triton.cdiv(M, _ENTRIES), R),
        arguments={
            "edited_ptr": edited,
            "positions_ptr": positions,
            "lists_ptr": bias.lists,
            "ids_ptr": bias.ids,
            "values_ptr": bias.values,
            "until_ptr": bias.until,
            "V": V,
            "M": M,
            "ENTRIES": _ENTRIES,
        },
    )


def example_launches(logits: Tensor) -> list[Launch]:
    """For compile checks, over `logits` [R, V] of the meta device."""
    R, V = logits.shape

    def new(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    strength, row, entries = new(R, dtype=torch.float32), new(R), new(R, 1024)
    counts = new(R, V, dtype=torch.int32)
    penalties = Penalties(counts, row, new(R, 7), strength, strength, strength)
    bias = BiasEntries(row, entries, new(R, 1024, dtype=torch.float32), entries)
    return [_penalise_launch(logits, penalties, logits, TILE), _bias_launch(logits, row, bias)]
