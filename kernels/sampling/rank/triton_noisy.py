"""Scores to rank drafts by in Triton, as `noisy_reference.add_noise`, without a sort.

One program per (tile of the vocabulary, row) adds the noise. For rows with filters, programs first
count tokens by bins of the distance to the highest logit, and one program per row finds the last
bin that is kept. Counts are integers, so their order does not matter. Guesses may be rough: the
noise is computed in float32, and NaN counts as -inf.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.sampling.rank.noisy_reference import BINS, BINS_PER_NAT, OUTSIDE
from kernels.sampling.settings import DrawSettings
from kernels.sampling.triton_functions import MINUS_INFINITY, noise_bits, noise_key, uniform
from kernels.triton_launch import WIDEST_LOAD, Launch
from kernels.triton_overlap import await_inputs

TILE = 2048  # tokens of one program
_BINS: tl.constexpr = tl.constexpr(BINS)
_BINS_PER_NAT: tl.constexpr = tl.constexpr(float(BINS_PER_NAT))
_OUTSIDE: tl.constexpr = tl.constexpr(OUTSIDE)


@triton.jit
def logits_of_tile(logits_ptr, row, ids, logits_stride, V):
    """Logits in float32, without NaN; -inf beyond the vocabulary."""
    values = tl.load(logits_ptr + row * logits_stride + ids, mask=ids < V, other=MINUS_INFINITY)
    values = values.to(tl.float32)
    return tl.where(values == values, values, MINUS_INFINITY)


@triton.jit
def _scaled(logits_ptr, temperature, row, ids, logits_stride, V):
    """Logits after temperature."""
    values = logits_of_tile(logits_ptr, row, ids, logits_stride, V)
    return tl.div_rn(values, tl.where(temperature > 0.0, temperature, 1.0))


@triton.jit
def _bins(values, highest):
    """The bin of each value. Whatever is no finite distance is in the last bin."""
    gaps = (highest - values) * _BINS_PER_NAT
    known = (gaps >= 0.0) & (gaps < _BINS)
    return tl.where(known, gaps, _BINS - 1.0).to(tl.int32)


@triton.jit
def _highest_of_tile_kernel(
    logits_ptr,  # [R, V] of any float type, rows logits_stride apart
    temperature_ptr,  # [B] float32; row r has those of (begin + r) // PER_ROW, as of the rest
    highest_ptr,  # [R, tiles] float32 out
    counts_ptr,  # [R, BINS] int32 out: zeros
    logits_stride,
    V,
    begin,
    PER_ROW: tl.constexpr,
    TILE: tl.constexpr,
):
    """The highest scaled logit of one tile of one row, grid (tiles, R)."""
    await_inputs()
    tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    ids = tile * TILE + tl.arange(0, TILE)
    temperature = tl.load(temperature_ptr + (begin + row) // PER_ROW)
    values = _scaled(logits_ptr, temperature, row, ids, logits_stride, V)
    tl.store(highest_ptr + row * tl.num_programs(0) + tile, tl.max(values, axis=0))
    if tile == 0:
        bins = tl.arange(0, _BINS)
        tl.store(counts_ptr + row * _BINS + bins, tl.zeros([_BINS], tl.int32))


@triton.jit
def _highest_of_row(highest_ptr, row, num_tiles, TILES: tl.constexpr):
    tiles = tl.arange(0, TILES)
    inside = tiles < num_tiles
    found = tl.load(highest_ptr + row * num_tiles + tiles, mask=inside, other=MINUS_INFINITY)
    return tl.max(found, axis=0)


@triton.jit
def _count_bins_kernel(
    logits_ptr,  # as in `_highest_of_tile_kernel`
    temperature_ptr,
    highest_ptr,  # [R, tiles] float32
    counts_ptr,  # [R, BINS] int32, zero before
    logits_stride,
    V,
    begin,
    PER_ROW: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,  # a power of two, at least the number of tiles
):
    """Count the tokens of one tile of one row by their bins, grid (tiles, R)."""
    await_inputs()
    tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    temperature = tl.load(temperature_ptr + (begin + row) // PER_ROW)
    if temperature > 0.0:
        ids = tile * TILE + tl.arange(0, TILE)
        values = _scaled(logits_ptr, temperature, row, ids, logits_stride, V)
        highest = _highest_of_row(highest_ptr, row, tl.num_programs(0), TILES)
        counts = tl.histogram(_bins(values, highest), _BINS, mask=ids < V)
        bins = tl.arange(0, _BINS)
        tl.atomic_add(counts_ptr + row * _BINS + bins, counts, mask=counts > 0, sem="relaxed")


@triton.jit
def _num_kept_kernel(
    counts_ptr,  # [R, BINS] int32
    top_k_ptr,  # [B] int64 or int32; or None
    top_p_ptr,  # [B] float32; or None
    min_p_ptr,  # [B] float32; or None
    num_kept_ptr,  # [R] int32 out
    begin,
    PER_ROW: tl.constexpr,
):
    """How many of the best bins a row keeps, grid (R,); see `noisy_reference.num_kept_bins`."""
    await_inputs()
    row = tl.program_id(0).to(tl.int64)
    owner = (begin + row) // PER_ROW
    bins = tl.arange(0, _BINS)
    counts = tl.load(counts_ptr + row * _BINS + bins)
    before = tl.cumsum(counts, axis=0) - counts
    keeps = bins >= 0
    if top_k_ptr is not None:
        top_k = tl.load(top_k_ptr + owner).to(tl.int32)
        keeps = before < top_k
        counts = tl.minimum(counts, tl.maximum(top_k - before, 0))
    if top_p_ptr is not None:
        top_p = tl.load(top_p_ptr + owner)
        masses = counts.to(tl.float32) * tl.exp(-(bins.to(tl.float32) + 0.5) / _BINS_PER_NAT)
        upto = tl.cumsum(masses, axis=0)
        total = tl.sum(masses, axis=0)
        keeps = keeps & (upto - masses < tl.where(top_p < 1.0, top_p, 2.0) * total)
    if min_p_ptr is not None:
        reach = -tl.log(tl.load(min_p_ptr + owner)) * _BINS_PER_NAT + 1.0
        keeps = keeps & (bins.to(tl.float32) < reach)
    tl.store(num_kept_ptr + row, tl.maximum(tl.sum(keeps.to(tl.int32), axis=0), 1))


@triton.jit
def _rough_gumbel(bits):
    """-log(-log(1 - v)), v = uniform(bits), to about 1e-3: a series where 1 - v would lose v."""
    v = tl.minimum(uniform(bits), 0.999999940395355224609375)
    series = v * (1.0 + v * (0.5 + v * 0.3333333333333333))
    return -tl.log(tl.where(v < 0.001, series, -tl.log(1.0 - v)))


@triton.jit
def noisy_tile(
    logits_ptr,  # as in `_highest_of_tile_kernel`
    temperature_ptr,
    seeds_ptr,  # [B] int64
    token_ids_ptr,  # [V] int64; None: 0, 1, ...
    highest_ptr,  # [R, tiles] float32; None: no filters, as for the next
    num_kept_ptr,  # [R] int32
    position,  # int64, of the token to draw
    row,
    owner,
    num_tiles,
    ids,
    logits_stride,
    V,
    TILES: tl.constexpr,
):
    """The logits of one tile of one row as the row ranks them."""
    temperature = tl.load(temperature_ptr + owner)
    values = _scaled(logits_ptr, temperature, row, ids, logits_stride, V)
    if temperature > 0.0:
        if highest_ptr is not None:
            highest = _highest_of_row(highest_ptr, row, num_tiles, TILES)
            outside = _bins(values, highest) >= tl.load(num_kept_ptr + row)
            values = tl.where(outside, values - _OUTSIDE, values)
        tokens = ids
        if token_ids_ptr is not None:
            tokens = tl.load(token_ids_ptr + ids, mask=ids < V, other=0).to(tl.int32)
        key = noise_key(tl.load(seeds_ptr + owner), position)
        values += _rough_gumbel(noise_bits(key, tokens))
    return values


@triton.jit
def _add_noise_kernel(
    logits_ptr,  # as in `noisy_tile`
    temperature_ptr,
    seeds_ptr,
    positions_ptr,  # [R] int64
    token_ids_ptr,
    highest_ptr,
    num_kept_ptr,
    noisy_ptr,  # [R, V] float32 out
    logits_stride,
    V,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
):
    """One tile of one row, grid (tiles, R)."""
    await_inputs()
    tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    ids = tile * TILE + tl.arange(0, TILE)
    values = noisy_tile(
        logits_ptr, temperature_ptr, seeds_ptr, token_ids_ptr, highest_ptr, num_kept_ptr,
        tl.load(positions_ptr + row), row, row, tl.num_programs(0), ids, logits_stride, V,
        TILES,
    )  # fmt: skip
    tl.store(noisy_ptr + row * V + ids, values, mask=ids < V)


def add_noise(
    logits: Tensor, settings: DrawSettings, token_ids: Tensor | None, tile: int = TILE
) -> Tensor:
    """As the reference: logits [R, V] float32 -> [R, V] float32."""
    if not settings.any_sampled:
        return logits
    noisy = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    for launch in _launches(logits, settings, token_ids, noisy, tile):
        launch.run()
    return noisy


def _launches(
    logits: Tensor, settings: DrawSettings, token_ids: Tensor | None, noisy: Tensor, tile: int
) -> Iterator[Launch]:
    R, V = logits.shape
    assert logits.dtype == torch.float32
    assert logits.stride(1) == 1
    num_tiles = triton.cdiv(V, tile)
    shared = {
        "logits_ptr": logits,
        "temperature_ptr": settings.temperature,
        "logits_stride": logits.stride(0),
        "V": V,
        "TILE": tile,
    }
    found, before = filter_launches(settings, shared, R, 0, 1)
    yield from before
    own = {
        "seeds_ptr": settings.seeds,
        "positions_ptr": settings.positions,
        "token_ids_ptr": token_ids,
        "noisy_ptr": noisy,
        "TILES": triton.next_power_of_2(num_tiles),
    }
    yield Launch(
        name=f"add_noise[V={V}{filtered(settings)}{'' if token_ids is None else ', mapped'}]",
        kernel=_add_noise_kernel,
        grid=(num_tiles, R),
        arguments=shared | found | own,
        min_load_bits=WIDEST_LOAD,
    )


def filtered(settings: DrawSettings) -> str:
    """Part of the name of a launch."""
    return ", filtered" if settings.is_filtered else ""


def filter_launches(
    settings: DrawSettings, shared: dict[str, Any], num_rows: int, begin: int, per_row: int
) -> tuple[dict[str, Any], list[Launch]]:
    """What `noisy_tile` needs to know of the filters of `num_rows` rows of logits, of which row r
    has the settings of (begin + r) // per_row; and the launches that find it out."""
    if not settings.is_filtered:
        return {"highest_ptr": None, "num_kept_ptr": None}, []
    device, V = shared["logits_ptr"].device, shared["V"]
    num_tiles = triton.cdiv(V, shared["TILE"])
    highest = torch.empty(num_rows, num_tiles, dtype=torch.float32, device=device)
    num_kept = torch.empty(num_rows, dtype=torch.int32, device=device)
    counts = torch.empty(num_rows, BINS, dtype=torch.int32, device=device)
    both: dict[str, Any] = {"counts_ptr": counts, "begin": begin, "PER_ROW": per_row}
    launches = _tile_launches(shared | both | {"highest_ptr": highest})
    launches.append(_kept_launch(settings, both | {"num_kept_ptr": num_kept}, V))
    return {"highest_ptr": highest, "num_kept_ptr": num_kept}, launches


def _tile_launches(arguments: dict[str, Any]) -> list[Launch]:
    """Those that find the highest logits, and count tokens by bins."""
    logits, V, per_row = (arguments[name] for name in ("logits_ptr", "V", "PER_ROW"))
    num_tiles = triton.cdiv(V, arguments["TILE"])
    kind = str(logits.dtype).removeprefix("torch.")
    name = f"[V={V}, {kind}{'' if per_row == 1 else ', nodes'}]"
    sizes = {"TILES": triton.next_power_of_2(num_tiles)}
    highest = Launch(
        name=f"add_noise.highest{name}",
        kernel=_highest_of_tile_kernel,
        grid=(num_tiles, len(logits)),
        arguments=arguments,
        min_load_bits=WIDEST_LOAD,
    )
    bins = replace(
        highest,
        name=f"add_noise.count_bins{name}",
        kernel=_count_bins_kernel,
        arguments=arguments | sizes,
    )
    return [highest, bins]


def _kept_launch(settings: DrawSettings, arguments: dict[str, Any], V: int) -> Launch:
    filters = {
        "top_k_ptr": settings.top_k,
        "top_p_ptr": settings.top_p,
        "min_p_ptr": settings.min_p,
    }
    nodes = "" if arguments["PER_ROW"] == 1 else ", nodes"
    return Launch(
        name=f"add_noise.num_kept[V={V}{nodes}]",
        kernel=_num_kept_kernel,
        grid=(len(arguments["num_kept_ptr"]),),
        arguments=arguments | filters,
    )


def example_launches(logits: Tensor) -> list[Launch]:
    """Launches for compile checks, over `logits` [R, V] of the meta device: with and without
    filters and a map of the vocabulary."""
    R, V = logits.shape
    floats = torch.empty(R, dtype=torch.float32, device=logits.device)
    integers = torch.empty(R, dtype=torch.int64, device=logits.device)
    token_ids = torch.empty(V, dtype=torch.int64, device=logits.device)
    plain = DrawSettings(floats, integers, integers)
    filtered = DrawSettings(floats, integers, integers, integers, floats, floats)
    return [
        *_launches(logits, plain, None, logits, TILE),
        *_launches(logits, filtered, token_ids, logits, TILE),
    ]
