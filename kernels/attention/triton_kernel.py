"""Paged attention over a prefix and a causal or tree-shaped suffix, for Hopper.

Work is cut into programs (KV head, split, tile). A tile is up to BLOCK_M rows of one batch row's
queries: row m of a tile is query m // GROUP and query head m % GROUP of the program's KV head. So
query heads that share a KV head load its keys and values once. A tile sees the keys from
`first_key` to the last suffix entry that any of its queries sees; a split is an equal part of
them, in steps of BLOCK_N keys. Keys and values are gathered through the block table: one key of
one head is D contiguous numbers, and programs of neighbouring heads run at the same time.

With one split, a program writes the output. With more, it writes the attention over its part and
the base-2 logarithm of the softmax sum, and the parts are averaged, weighted by these sums: by
`merge_splits`, or, where few rows share a tile, by the last program of the tile and KV head that
ends. The number of splits is that of the longest context; programs for which a tile has too few
keys end at once, and a tile of one part needs no average. `triton_plan` chooses all sizes.

**Round trips.** One row with a short context is a chain of loads of which each waits for the one
before, 0.6 to 0.8 us on an H200 with a cold cache, after some 2 us to start. Without EARLY these
are six and the keys: lengths; ancestors and queries; block table; keys and values; then the count
of the parts, their sums, and the parts, eight at a time. With EARLY they are four: the first step's
place in the block table and that of a lone query follow from the grid in nearly all launches, so
both are read with the lengths, and once more if the lengths say otherwise. (Of trees, only the
table.) The last program reads the sums with the parts, and as many parts at a time as 64 registers
hold: 16 of four rows.
On an H200, one row of the 8B shape takes 7.5 us with 300 keys and 18.0 with 8,192.

The result depends on the plan in its last bits: sums are added in another order.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attention.triton_lookup import (
    bit_length,
    either,
    find_blocks,
    find_tile,
    has_bit,
    is_seen,
    load_queries,
    slot_of,
)
from kernels.attention.triton_parts import average_if_last, merge_splits, write_part, write_rows
from kernels.attention.triton_plan import MAX_COUNTERS, Shape, TilePlan, plan_tiles
from kernels.linear.scaled import FP8
from kernels.ops import UNSCALED, AttentionMeta, CacheScales
from kernels.triton_launch import WIDEST_LOAD, Launch
from kernels.triton_overlap import await_inputs

BLOCK_SIZE = 16
HEAD_DIMS = (16, 32, 64, 128)
MAX_GROUP = 64
_FEW_STEPS = 8
_MERGED_NUMBERS = 8192  # of parts that a program reads at a time: 64 registers of 4 warps
_INTERPRETED_PROCESSORS = 2


@triton.jit(do_not_specialize=["table_columns"])
def attend_splits(
    out_ptr,  # [T, Hq * D]; not written with SPLIT, except with MERGES
    parts_ptr,  # with SPLIT: [tiles, Hkv, splits, BLOCK_M, D] float32
    log_sums_ptr,  # with SPLIT: [tiles, Hkv, splits, BLOCK_M] float32, -inf for an empty part
    counters_ptr,  # with MERGES: [tiles, Hkv] int32, zero before and after
    q_ptr,  # [T, Hq, D]
    k_ptr,  # [num_blocks, BLOCK_SIZE, Hkv, D]
    v_ptr,  # like k_ptr
    cu_q_ptr,  # [B + 1] int32
    prefix_lens_ptr,  # [B] int32
    first_keys_ptr,  # [B] int32
    block_tables_ptr,  # [B, max_blocks] int32
    ancestors_ptr,  # [T] int64
    scale,  # factor of the scores, times log2(e)
    value_scale,  # factor of the results
    num_rows,
    tiles_per_row,
    fewest,  # the launch handles batch rows of fewest .. most queries
    most,
    out_stride,
    q_stride_token,
    q_stride_head,
    k_stride_block,
    k_stride_slot,
    k_stride_head,
    v_stride_block,
    v_stride_slot,
    v_stride_head,
    table_stride,
    table_columns,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIN_STEPS: tl.constexpr,  # least steps of BLOCK_N keys per split, if the tile sees that many
    FEW_STEPS: tl.constexpr,
    SEARCH: tl.constexpr,
    SPLIT: tl.constexpr,
    MERGES: tl.constexpr,  # with SPLIT: the last program averages the parts
    MERGED_ROWS: tl.constexpr,  # with MERGES: the rows of the tile that are used, a power of 2
    MERGED_PARTS: tl.constexpr,  # with MERGES: parts that are read at a time, a power of 2
    EARLY: tl.constexpr,  # looks for keys where a row without a window has them
    ONE: tl.constexpr,  # 1: batch rows have at most one query; 0: they may have more
    ALIKE: tl.constexpr,  # keys and values have the same strides
    PRODUCT: tl.constexpr,  # input type of the matrix products
):
    """One part of the keys of one tile for one KV head. Grid (Hkv, splits, tiles)."""
    await_inputs()
    kv_head, split = tl.program_id(0), tl.program_id(1)
    # The last tiles of a causal chunk see the most keys, so they start first.
    tile = tl.num_programs(2) - 1 - tl.program_id(2)
    row, first_query = find_tile(tile, cu_q_ptr, num_rows, tiles_per_row, BLOCK_M // GROUP, SEARCH)
    start = tl.load(cu_q_ptr + row)
    count = tl.load(cu_q_ptr + row + 1) - start
    prefix, first_key = tl.load(prefix_lens_ptr + row), tl.load(first_keys_ptr + row)

    rows = tl.arange(0, BLOCK_M)
    queries = first_query + rows // GROUP  # within the batch row
    heads = kv_head * GROUP + rows % GROUP
    in_tile = rows < BLOCK_M // GROUP * GROUP
    table_ptr = block_tables_ptr + row.to(tl.int64) * table_stride
    table_end = table_columns * BLOCK_SIZE  # no key lies there or beyond
    likely_start, likely_key = row * most, split * (MIN_STEPS * BLOCK_N)
    if EARLY:  # the place of the first keys and of a lone query, if rows are as usual
        blocks = find_blocks(table_ptr, likely_key + tl.arange(0, BLOCK_N), table_end, BLOCK_SIZE)
    if EARLY and ONE:  # with more queries, Triton 3.9 would prefetch no keys after the branch
        ancestors, q = load_queries(
            ancestors_ptr, q_ptr, likely_start, queries, heads, in_tile & (queries < most),
            q_stride_token, q_stride_head, D, ONE,
        )  # fmt: skip
    if (count < fewest) | (count > most) | (first_query >= count):
        return
    wanted = in_tile & (queries < count)  # [BLOCK_M]
    if EARLY and ONE:
        if start != likely_start:
            ancestors, q = load_queries(
                ancestors_ptr, q_ptr, start, queries, heads, wanted,
                q_stride_token, q_stride_head, D, ONE,
            )  # fmt: skip
    else:
        ancestors, q = load_queries(
            ancestors_ptr, q_ptr, start, queries, heads, wanted,
            q_stride_token, q_stride_head, D, ONE,
        )  # fmt: skip

    # Suffix entries that some query of the tile sees: those below `causal` and the bits of `tree`.
    if ONE:
        causal = 0
        tree = tl.where(ancestors == 0, 1, ancestors)  # causal: the query sees itself
    else:
        causal = tl.max(tl.where(wanted & (ancestors == 0), queries + 1, 0), axis=0)
        tree = tl.reduce(ancestors, 0, either)
    num_keys = prefix + tl.maximum(causal, bit_length(tree)) - first_key
    # All queries of the tile see the first `num_plain` keys.
    num_plain = prefix - first_key + tl.where(tree == 0, first_query + 1, 0)

    steps = tl.cdiv(num_keys, BLOCK_N)
    parts = tl.minimum(tl.num_programs(1), tl.cdiv(steps, MIN_STEPS))
    if MERGES and split >= parts:
        return
    each = steps // parts  # the first parts have one step more
    more = steps - each * parts
    begin = tl.minimum(split * each + tl.minimum(split, more), steps)
    end = tl.minimum(begin + each + (split < more).to(tl.int32), steps)
    plain_end = tl.minimum(tl.maximum(num_plain // BLOCK_N, begin), end)
    # Nothing is prefetched between the two loops, so a short part is quicker in one.
    plain_end = tl.where((plain_end < end) & (end - begin <= FEW_STEPS), begin, plain_end)

    keys_at = first_key + begin * BLOCK_N + tl.arange(0, BLOCK_N)
    end_key = tl.minimum(first_key + end * BLOCK_N, table_end)
    if EARLY:
        if first_key + begin * BLOCK_N != likely_key:
            blocks = find_blocks(table_ptr, keys_at, end_key, BLOCK_SIZE)
    else:
        blocks = find_blocks(table_ptr, keys_at, end_key, BLOCK_SIZE)
    k_ptr += kv_head.to(tl.int64) * k_stride_head
    v_ptr += kv_head.to(tl.int64) * v_stride_head
    out = tl.zeros([BLOCK_M, D], dtype=tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    for MASKED in tl.static_range(ONE, 2):  # for one query, masks cost nothing
        out, peak, total, blocks = attend_steps(
            out, peak, total, blocks, q, queries, ancestors, causal, tree,
            begin if ONE else (plain_end if MASKED else begin), end if MASKED else plain_end,
            first_key, prefix, end_key, table_ptr, k_ptr, v_ptr, scale,
            k_stride_block, k_stride_slot, v_stride_block, v_stride_slot,
            D, BLOCK_SIZE, BLOCK_N, MASKED, ONE, ALIKE, PRODUCT,
        )  # fmt: skip

    out = out / tl.where(total > 0, total, 1.0)[:, None] * value_scale
    own = (start + queries).to(tl.int64) * out_stride + heads * D
    if not SPLIT:
        write_rows(out_ptr, own, out, wanted, D)
    else:
        first_part = (tile.to(tl.int64) * tl.num_programs(0) + kv_head) * tl.num_programs(1)
        if MERGES and parts == 1:
            write_rows(out_ptr, own, out, wanted, D)
        else:
            write_part(
                parts_ptr, log_sums_ptr, first_part + split, out, peak, total, wanted, end - begin,
                D, BLOCK_M,
            )  # fmt: skip
            if MERGES:
                average_if_last(
                    counters_ptr + tile * tl.num_programs(0) + kv_head,
                    out_ptr, parts_ptr, log_sums_ptr, first_part, parts,
                    start, count, first_query, kv_head, out_stride,
                    GROUP, D, BLOCK_M, MERGED_ROWS, MERGED_PARTS,
                )  # fmt: skip


@triton.jit
def attend_steps(
    out, peak, total, blocks, q, queries, ancestors, causal, tree, begin, end, first_key, prefix,
    end_key, table_ptr, k_ptr, v_ptr, scale,
    k_stride_block, k_stride_slot, v_stride_block, v_stride_slot,
    D: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
    ONE: tl.constexpr, ALIKE: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """Add the keys of steps begin .. end-1: `out` [BLOCK_M, D] sums values weighted by
    2^(score - peak), `total` the weights. Without MASKED all queries see all of these keys.
    `blocks` are those of step `begin`; the result has those of step `end`, if its keys lie before
    `end_key`."""
    columns = tl.arange(0, D)[None, :]
    k_ptrs, v_ptrs = k_ptr + columns, v_ptr + columns
    # Blocks are looked up one step ahead. If the step that uses them looked them up, the compiler
    # would spend its pipeline stages on the lookup and prefetch no keys.
    for step in range(begin, end):
        keys_at = first_key + step * BLOCK_N + tl.arange(0, BLOCK_N)
        next_blocks = find_blocks(table_ptr, keys_at + BLOCK_N, end_key, BLOCK_SIZE)
        wide = blocks.to(tl.int64)
        slots = slot_of(keys_at, BLOCK_SIZE)
        k_places = (wide * k_stride_block + slots * k_stride_slot)[:, None]
        v_places = k_places
        if not ALIKE:
            v_places = (wide * v_stride_block + slots * v_stride_slot)[:, None]
        if MASKED:
            entries = keys_at - prefix  # index in the suffix; negative in the prefix
            seen = is_seen(entries, causal, tree)  # other keys may hold NaN
            keys = tl.load(k_ptrs + k_places, mask=seen[:, None], other=0.0)
            values = tl.load(v_ptrs + v_places, mask=seen[:, None], other=0.0)
        else:
            keys = tl.load(k_ptrs + k_places)
            values = tl.load(v_ptrs + v_places)
        keys = tl.trans(keys.to(q.dtype)).to(PRODUCT)
        scores = tl.dot(q.to(PRODUCT), keys, input_precision="ieee") * scale  # [BLOCK_M, BLOCK_N]
        if MASKED and ONE:
            scores = tl.where(seen[None, :], scores, float("-inf"))
        elif MASKED:
            is_tree = (ancestors != 0)[:, None]
            in_chunk = entries[None, :] <= queries[:, None]
            in_tree = (entries < 0)[None, :] | has_bit(ancestors[:, None], entries[None, :])
            scores = tl.where((is_tree & in_tree) | (~is_tree & in_chunk), scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, axis=1))
        # The peak is -inf for a query that has seen no key yet; -inf minus -inf would be NaN.
        origin = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights = tl.exp2(scores - origin[:, None])
        fade = tl.exp2(peak - origin)
        total = total * fade + tl.sum(weights, axis=1)
        weights = weights.to(q.dtype).to(PRODUCT)
        values = values.to(q.dtype).to(PRODUCT)
        out = tl.dot(weights, values, acc=out * fade[:, None], input_precision="ieee")
        peak = new_peak
        blocks = next_blocks
    return out, peak, total, blocks


def attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    meta: AttentionMeta,
    scale: float,
    scales: CacheScales = UNSCALED,
) -> Tensor:
    """As the reference: queries q [T, Hq, D] over caches [num_blocks, 16, Hkv, D] -> [T, Hq * D].

    Tokens from cu_q[-1] on belong to no row and get no output. bfloat16 queries need bfloat16 or
    FP8 caches. Products are summed in float32; softmax weights are rounded to the type of q.

    Raises:
        ValueError: the kernel does not support a type or shape.
    """
    _check(q, k_cache, v_cache)
    _check_layout(meta)
    q = q if q.stride(-1) == 1 else q.contiguous()
    out = q.new_empty(q.shape[0], q.shape[1] * q.shape[2])
    factors = _Factors(scale * scales.key, scales.value)
    processors = _num_processors(q.device)
    for launch in _launches_of(q, k_cache, v_cache, meta, factors, out, processors):
        launch.run()
    return out


def _check(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    D, group = q.shape[2], q.shape[1] // k_cache.shape[2]
    if D not in HEAD_DIMS:
        raise ValueError(f"attention: head_dim {D} is not one of {HEAD_DIMS}")
    if k_cache.shape[1] != BLOCK_SIZE:
        raise ValueError(f"attention: block size {k_cache.shape[1]} is not {BLOCK_SIZE}")
    if group > MAX_GROUP:
        raise ValueError(f"attention: {group} query heads of a KV head, at most {MAX_GROUP}")
    types = (q.dtype, k_cache.dtype)
    known = [(torch.bfloat16,) * 2, (torch.float32, torch.bfloat16), (torch.float32,) * 2]
    known += [(torch.bfloat16, FP8), (torch.float32, FP8)]
    if types not in known or v_cache.dtype != k_cache.dtype:
        raise ValueError(
            f"attention: queries of {q.dtype} with keys of {k_cache.dtype}, values of "
            f"{v_cache.dtype}; allowed are bfloat16 throughout, float32 queries with bfloat16 or "
            "float32 caches, and either with float8_e4m3fn caches"
        )
    assert k_cache.stride(3) == v_cache.stride(3) == 1


def _check_layout(meta: AttentionMeta) -> None:
    """The kernel assumes that entry i of each tensor lies i places after its first entry."""
    whole = (meta.cu_q, meta.prefix_lens, meta.first_keys, meta.ancestors)
    assert all(part.is_contiguous() for part in whole), "attention: a view with gaps or repeats"
    assert meta.block_tables.stride(1) == 1, "attention: block tables by columns"


@functools.cache
def _num_processors(device: torch.device) -> int:
    if device.type != "cuda":
        return _INTERPRETED_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def _launches_of(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    meta: AttentionMeta,
    factors: _Factors,
    out: Tensor,
    num_processors: int,
) -> list[Launch]:
    (T, heads, D), kv_heads = q.shape, k_cache.shape[2]
    shape = Shape(
        num_tokens=T,
        num_rows=meta.cu_q.shape[0] - 1,
        max_q=meta.max_q,
        max_context=meta.max_context,
        group=heads // kv_heads,
        kv_heads=kv_heads,
        head_dim=D,
        num_processors=num_processors,
        fp8=k_cache.dtype is FP8,
    )
    launches = []
    for plan in plan_tiles(shape):
        parts = _Parts.of(plan, kv_heads, D, q.device) if plan.num_splits > 1 else None
        launches.append(_attend(q, k_cache, v_cache, meta, factors, out, parts, plan))
        if parts is not None and not plan.merges:
            launches.append(_merge(out, *parts, meta, plan, shape.group))
    return launches


class _Factors(NamedTuple):
    scores: float
    results: float


class _Parts(NamedTuple):
    """What the programs of `attend_splits` write."""

    values: Tensor  # [tiles, Hkv, splits, BLOCK_M, D] float32
    log_sums: Tensor  # [tiles, Hkv, splits, BLOCK_M] float32

    @classmethod
    def of(cls, plan: TilePlan, kv_heads: int, D: int, device: torch.device) -> _Parts:
        shape = (plan.num_tiles, kv_heads, plan.num_splits, plan.block_m)
        values = torch.empty(*shape, D, dtype=torch.float32, device=device)
        return cls(values, torch.empty(shape, dtype=torch.float32, device=device))


@functools.cache
def _counters(device: torch.device) -> Tensor:
    """Zeros that every launch leaves as zeros. Launches on a device come one after the other. The
    first call is not in a graph's capture, because steps run before they are captured."""
    return torch.zeros(MAX_COUNTERS, dtype=torch.int32, device=device)


def _attend(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    meta: AttentionMeta,
    factors: _Factors,
    out: Tensor,
    parts: _Parts | None,
    plan: TilePlan,
) -> Launch:
    kv_heads, D = k_cache.shape[2:]
    group = q.shape[1] // kv_heads
    merged_rows = min(triton.next_power_of_2(group * max(plan.most, 1)), plan.block_m)
    values, log_sums = parts or (None, None)
    # The interpreter cannot multiply bfloat16.
    exact = q.dtype == torch.float32 or q.device.type == "cpu"
    words = [_name(plan, group, D), *["merges"] * plan.merges, *["one query"] * (plan.most == 1)]
    words += [*["early"] * plan.early, f"steps of {plan.cut.step_keys}"]
    words += ["fp8 cache"] * (k_cache.dtype is FP8)
    return Launch(
        name=f"attend_splits[{', '.join(words)}]",
        kernel=attend_splits,
        grid=(kv_heads, plan.num_splits, plan.num_tiles),
        arguments={
            "out_ptr": out,
            "parts_ptr": values,
            "log_sums_ptr": log_sums,
            "counters_ptr": _counters(q.device) if plan.merges else None,
            "q_ptr": q,
            "k_ptr": k_cache,
            "v_ptr": v_cache,
            **_tile_arguments(meta, plan),
            "prefix_lens_ptr": meta.prefix_lens,
            "first_keys_ptr": meta.first_keys,
            "block_tables_ptr": meta.block_tables,
            "ancestors_ptr": meta.ancestors,
            "scale": factors.scores / math.log(2),
            "value_scale": factors.results,
            "out_stride": out.stride(0),
            "q_stride_token": q.stride(0),
            "q_stride_head": q.stride(1),
            "k_stride_block": k_cache.stride(0),
            "k_stride_slot": k_cache.stride(1),
            "k_stride_head": k_cache.stride(2),
            "v_stride_block": v_cache.stride(0),
            "v_stride_slot": v_cache.stride(1),
            "v_stride_head": v_cache.stride(2),
            "table_stride": meta.block_tables.stride(0),
            "table_columns": meta.block_tables.shape[1],
            "GROUP": group,
            "D": D,
            "BLOCK_SIZE": k_cache.shape[1],
            "BLOCK_N": plan.cut.step_keys,
            "MIN_STEPS": plan.cut.part_keys // plan.cut.step_keys,
            "FEW_STEPS": _FEW_STEPS,
            "SPLIT": parts is not None,
            "MERGES": plan.merges,
            "MERGED_ROWS": merged_rows,
            "MERGED_PARTS": min(max(_MERGED_NUMBERS // (merged_rows * D), 1), 16),
            "EARLY": plan.early,
            "ONE": int(plan.most == 1),
            "ALIKE": k_cache.stride()[:2] == v_cache.stride()[:2],
            "PRODUCT": tl.float32 if exact else tl.bfloat16,
        },
        num_warps=plan.cut.num_warps,
        num_stages=plan.cut.num_stages,
        wgmma=plan.block_m >= 64,
        min_load_bits=WIDEST_LOAD,
    )


def _merge(
    out: Tensor, parts: Tensor, log_sums: Tensor, meta: AttentionMeta, plan: TilePlan, group: int
) -> Launch:
    num_tiles, kv_heads, num_splits, block_m, D = parts.shape
    max_splits = triton.next_power_of_2(num_splits)
    merged_rows = max(min(8, 4096 // (max_splits * D)), 1)
    return Launch(
        name=f"merge_splits[{_name(plan, group, D)}, splits<={max_splits}]",
        kernel=merge_splits,
        grid=(block_m // merged_rows, kv_heads, num_tiles),
        arguments={
            "out_ptr": out,
            "parts_ptr": parts,
            "log_sums_ptr": log_sums,
            **_tile_arguments(meta, plan),
            "num_splits": num_splits,
            "out_stride": out.stride(0),
            "GROUP": group,
            "D": D,
            "MERGED_ROWS": merged_rows,
            "MAX_SPLITS": max_splits,
        },
        num_warps=8,  # with 4, Triton 3.6 spills
        min_load_bits=WIDEST_LOAD,
    )


def _tile_arguments(meta: AttentionMeta, plan: TilePlan) -> dict[str, object]:
    return {
        "cu_q_ptr": meta.cu_q,
        "num_rows": meta.cu_q.shape[0] - 1,
        "tiles_per_row": plan.tiles_per_row,
        "fewest": plan.fewest,
        "most": plan.most,
        "BLOCK_M": plan.block_m,
        "SEARCH": plan.search,
    }


def _name(plan: TilePlan, group: int, D: int) -> str:
    words = [f"D={D}", f"group={group}", f"rows={plan.block_m}"]
    words += ["split"] * (plan.num_splits > 1) + ["search"] * plan.search
    return ", ".join(words)


# SmolLM2, Llama 8B, an eighth of 70B and of Llama 4
_KNOWN_HEADS = ((9, 3, 64), (32, 8, 128), (8, 1, 128), (5, 1, 128))
_FP8_HEADS = ((9, 3, 64), (8, 1, 128))  # of these, also with caches in FP8
_KNOWN_BATCHES = (  # rows, queries of each or None for a mixed batch, context
    (1, 1, 8192),
    (16, 1, 8192),
    (64, 1, 8192),
    (1, 4, 8192),
    (1, 8, 8192),
    (64, 8, 8192),
    (1, 16, 8192),
    (64, 16, 8192),
    (1, 512, 8192),
    (8, None, 8192),
)


def launches() -> list[Launch]:
    """What the engine launches on a GPU of 132 processors, for the heads of the models we know."""
    found = {}
    for heads, kv_heads, D in _KNOWN_HEADS:
        kinds = (torch.bfloat16, FP8) if (heads, kv_heads, D) in _FP8_HEADS else (torch.bfloat16,)
        for rows, queries, context in _KNOWN_BATCHES:
            T = 512 + rows if queries is None else rows * queries
            q = torch.empty(T, heads, D, dtype=torch.bfloat16, device="meta")
            meta = _known_meta(rows, T, queries or 512, context)
            for dtype in kinds:
                cache = torch.empty(4096, BLOCK_SIZE, kv_heads, D, dtype=dtype, device="meta")
                factors = _Factors(D**-0.5, 1.0)
                made = _launches_of(q, cache, cache, meta, factors, q.flatten(1), 132)
                found.update({launch.name: launch for launch in made})
    return list(found.values())


def _known_meta(rows: int, num_tokens: int, max_q: int, max_context: int) -> AttentionMeta:
    integers = torch.empty(rows + 1, dtype=torch.int32, device="meta")
    return AttentionMeta(
        cu_q=integers,
        prefix_lens=integers[:-1],
        first_keys=integers[:-1],
        block_tables=torch.empty(rows, 8192, dtype=torch.int32, device="meta"),
        ancestors=torch.empty(num_tokens, dtype=torch.int64, device="meta"),
        max_q=max_q,
        max_context=max_context,
    )
