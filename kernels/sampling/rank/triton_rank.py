"""The best tokens after the nodes of a level, in two launches: `ranking.ComposedRanking` in Triton.

One program per (tile of the draft vocabulary, node) adds the noise and finds the tile's best
tokens; one per node joins them. Filters take three launches more, as in `triton_noisy`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.sampling.rank.ranking import NodeDraws, Ranked
from kernels.sampling.rank.triton_noisy import filter_launches, filtered, logits_of_tile, noisy_tile
from kernels.sampling.score.triton_score import join_sums, store_best, store_sums
from kernels.sampling.settings import DrawSettings
from kernels.sampling.triton_functions import NO_KEY, packed_id, packed_value
from kernels.triton_launch import WIDEST_LOAD, Launch
from kernels.triton_overlap import await_inputs

TILE = 2048  # tokens of one program


@triton.jit
def _rank_tile_kernel(
    logits_ptr,  # [R, V] of any float type, rows logits_stride apart
    temperature_ptr,  # [B] float32; None: no row has noise, as for the next two
    seeds_ptr,  # [B] int64
    positions_ptr,  # [B] int64 of the roots
    token_ids_ptr,  # [V] int64; None: 0, 1, ...
    highest_ptr,  # as in `noisy_tile`
    num_kept_ptr,
    tops_ptr,  # [R, tiles] float32 out: the highest value of each tile; None: no scores are wanted
    sums_ptr,  # [R, tiles] float32 out: sum of exp(value - highest)
    best_ptr,  # [R, tiles, count] int64 out: packed keys of the best tokens
    logits_stride,
    V,
    count,
    begin,
    ahead,
    STEP: tl.constexpr,
    PER_ROW: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,  # a power of two, at least the number of tiles
):
    """One tile after one node, grid (tiles, R)."""
    await_inputs()
    tile, node = tl.program_id(0), tl.program_id(1).to(tl.int64)
    num_tiles = tl.num_programs(0)
    ids = tile * TILE + tl.arange(0, TILE)
    if temperature_ptr is None:
        values = logits_of_tile(logits_ptr, node, ids, logits_stride, V)
    else:
        owner, place = (begin + node) // PER_ROW, (begin + node) % PER_ROW
        position = tl.load(positions_ptr + owner) + ahead + STEP * place
        values = noisy_tile(
            logits_ptr, temperature_ptr, seeds_ptr, token_ids_ptr, highest_ptr, num_kept_ptr,
            position, node, owner, num_tiles, ids, logits_stride, V, TILES,
        )  # fmt: skip
    at = node * num_tiles + tile
    if tops_ptr is not None:
        store_sums(values, at, tops_ptr, sums_ptr)
    store_best(values, ids, at, best_ptr, count)


@triton.jit
def _rank_node_kernel(
    tops_ptr,  # what `_rank_tile_kernel` found
    sums_ptr,
    best_ptr,
    token_ids_ptr,  # [V] int64; None: 0, 1, ...
    tokens_ptr,  # [R, count] int64 out
    scores_ptr,  # [R, count] float32 out; None: not wanted
    num_tiles,
    count,
    TILES: tl.constexpr,
    CANDIDATES: tl.constexpr,  # a power of two, at least num_tiles * count
):
    """Joins the tiles of one node, grid (R,)."""
    await_inputs()
    node = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, CANDIDATES)
    num_keys = num_tiles * count
    keys = tl.load(best_ptr + node * num_keys + lanes, mask=lanes < num_keys, other=NO_KEY)
    normaliser = 0.0
    if scores_ptr is not None:
        normaliser = join_sums(tops_ptr, sums_ptr, node, num_tiles, TILES)
    for place in range(count):
        best = tl.max(keys, axis=0)
        keys = tl.where(keys == best, NO_KEY, keys)
        token = packed_id(best).to(tl.int64)
        if token_ids_ptr is not None:
            token = tl.load(token_ids_ptr + token)
        tl.store(tokens_ptr + node * count + place, token)
        if scores_ptr is not None:
            tl.store(scores_ptr + node * count + place, packed_value(best) - normaliser)


def rank_drafts(
    logits: Tensor,
    draws: NodeDraws,
    target_ids: Tensor | None,
    count: int,
    scored: bool,
    tile: int = TILE,
) -> Ranked:
    """As `ComposedRanking`."""
    R, V = logits.shape
    count, device = min(count, V), logits.device
    ranked = Ranked(
        torch.empty(R, count, dtype=torch.int64, device=device),
        torch.empty(R, count, dtype=torch.float32, device=device) if scored else None,
    )
    for launch in _launches(logits, draws, target_ids, ranked, tile):
        launch.run()
    return ranked


def _launches(
    logits: Tensor, draws: NodeDraws, target_ids: Tensor | None, ranked: Ranked, tile: int
) -> list[Launch]:
    (R, V), count = logits.shape, ranked.tokens.shape[1]
    assert logits.stride(1) == 1
    num_tiles = triton.cdiv(V, tile)
    tiles = _new_tiles(logits, num_tiles, count, scored=ranked.scores is not None)
    noise, before = _noise(logits, draws, target_ids, tile)
    sizes = {"count": count, "TILES": triton.next_power_of_2(num_tiles)}
    name = _name(logits, draws, target_ids, ranked)
    of_tile = Launch(
        name=f"rank_drafts.tile{name}",
        kernel=_rank_tile_kernel,
        grid=(num_tiles, R),
        arguments=noise | tiles | sizes,
        min_load_bits=WIDEST_LOAD,
    )
    of_node = {
        "token_ids_ptr": target_ids,
        "tokens_ptr": ranked.tokens,
        "scores_ptr": ranked.scores,
        "num_tiles": num_tiles,
        "CANDIDATES": triton.next_power_of_2(num_tiles * count),
    }
    join = Launch(f"rank_drafts.node{name}", _rank_node_kernel, (R,), tiles | sizes | of_node)
    return [*before, of_tile, join]


def _name(logits: Tensor, draws: NodeDraws, target_ids: Tensor | None, ranked: Ranked) -> str:
    parts = [f"V={logits.shape[1]}", str(logits.dtype).removeprefix("torch.")]
    parts.append(f"count={ranked.tokens.shape[1]}")
    parts += [] if ranked.scores is None else ["scored"]
    parts += ["noisy"] if draws.rows.any_sampled else []
    parts += [] if target_ids is None else ["mapped"]
    return f"[{', '.join(parts)}{filtered(draws.rows)}]"


def _new_tiles(logits: Tensor, num_tiles: int, count: int, *, scored: bool) -> dict[str, Any]:
    """Buffers for the results of `_rank_tile_kernel`."""

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(len(logits), *shape, dtype=dtype, device=logits.device)

    return {
        "tops_ptr": new(num_tiles) if scored else None,
        "sums_ptr": new(num_tiles) if scored else None,
        "best_ptr": new(num_tiles, count, dtype=torch.int64),
    }


def _noise(
    logits: Tensor, draws: NodeDraws, target_ids: Tensor | None, tile: int
) -> tuple[dict[str, Any], list[Launch]]:
    """The arguments of `_rank_tile_kernel` that say how to rank, and launches before it."""
    rows, noisy = draws.rows, draws.rows.any_sampled
    shared = {
        "logits_ptr": logits,
        "temperature_ptr": rows.temperature if noisy else None,
        "logits_stride": logits.stride(0),
        "V": logits.shape[1],
        "TILE": tile,
    }
    filters: dict[str, Any] = {"highest_ptr": None, "num_kept_ptr": None}
    before: list[Launch] = []
    if noisy:
        filters, before = filter_launches(rows, shared, len(logits), draws.begin, draws.per_row)
    ranks = {
        "seeds_ptr": rows.seeds if noisy else None,
        "positions_ptr": rows.positions if noisy else None,
        "token_ids_ptr": target_ids if noisy else None,
        "begin": draws.begin,
        "ahead": draws.ahead,
        "STEP": draws.step,
        "PER_ROW": draws.per_row,
    }
    return shared | filters | ranks, before


def example_launches(device: torch.device) -> list[Launch]:
    """Launches for compile checks: a chain, a dynamic tree with filters, and the whole vocabulary
    of Llama 3 without noise."""

    def new(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    B, found = 64, []
    floats, row = new(B, dtype=torch.float32), new(B)
    plain, sure = DrawSettings(floats, row, row), DrawSettings(floats, row, row, any_sampled=False)
    full = DrawSettings(floats, row, row, row, floats, floats)
    for rows, V, per_row, count in (
        (plain, 32000, 1, 1),
        (full, 32000, 6, 6),
        (sure, 128256, 6, 6),
    ):
        logits = new(B * per_row, V, dtype=torch.bfloat16)
        scores = None if count == 1 else new(B * per_row, count, dtype=torch.float32)
        ids = None if rows is sure else new(V)
        ranked = Ranked(new(B * per_row, count), scores)
        found += _launches(logits, NodeDraws(rows, per_row, 1), ids, ranked, TILE)
    return found
