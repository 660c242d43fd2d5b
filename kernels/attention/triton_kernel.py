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
)
from kernels.attention.triton_parts import merge_parts, write_part, write_rows
from kernels.attention.triton_plan import (
    MAX_COUNTERS,
    MIN_SPLIT_KEYS,
    Shape,
    TilePlan,
    plan_tiles,
)
from kernels.linear.scaled import FP8
from kernels.ops import UNSCALED, AttentionMeta, CacheScales
from kernels.triton_launch import WIDEST_LOAD, Launch
from kernels.triton_overlap import await_inputs

BLOCK_SIZE = 16
HEAD_DIMS = (16, 32, 64, 128)
MAX_GROUP = 64
_FEW_STEPS = 8
_INTERPRETED_PROCESSORS = 2


@triton.jit
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
    MAX_SPLITS: tl.constexpr,  # with MERGES: a power of 2, at least the number of splits
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
    prefix = tl.load(prefix_lens_ptr + row)
    first_key = tl.load(first_keys_ptr + row)
    if (count < fewest) | (count > most) | (first_query >= count):
        return

    rows = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, D)
    queries = first_query + rows // GROUP  # within the batch row
    wanted = (rows < BLOCK_M // GROUP * GROUP) & (queries < count)  # [BLOCK_M]
    tokens = (start + queries).to(tl.int64)
    heads = kv_head * GROUP + rows % GROUP
    ancestors = tl.load(ancestors_ptr + tokens, mask=wanted, other=0)
    q = tl.load(
        q_ptr + (tokens * q_stride_token + heads * q_stride_head)[:, None] + columns[None, :],
        mask=wanted[:, None],
        other=0.0,
    )

    # Suffix entries that some query of the tile sees: those below `causal` and the bits of `tree`.
    causal = tl.max(tl.where(wanted & (ancestors == 0), queries + 1, 0), axis=0)
    tree = tl.reduce(ancestors, 0, either)
    num_keys = prefix + tl.maximum(causal, bit_length(tree)) - first_key
    # All queries of the tile see the first `num_plain` keys.
    num_plain = prefix - first_key + tl.where(tree == 0, first_query + 1, 0)

    steps = tl.cdiv(num_keys, BLOCK_N)
    parts = tl.minimum(tl.num_programs(1), tl.cdiv(steps, MIN_STEPS))
    if MERGES and split >= parts:
        return
    begin = steps * tl.minimum(split, parts) // parts
    end = steps * tl.minimum(split + 1, parts) // parts
    plain_end = tl.minimum(tl.maximum(num_plain // BLOCK_N, begin), end)
    # Nothing is prefetched between the two loops, so a short part is quicker in one.
    plain_end = tl.where((plain_end < end) & (end - begin <= FEW_STEPS), begin, plain_end)

    table_ptr = block_tables_ptr + row.to(tl.int64) * table_stride
    k_ptr += kv_head.to(tl.int64) * k_stride_head
    v_ptr += kv_head.to(tl.int64) * v_stride_head
    out = tl.zeros([BLOCK_M, D], dtype=tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    for MASKED in tl.static_range(2):
        out, peak, total = attend_steps(
            out, peak, total, q, queries, ancestors, causal, tree,
            plain_end if MASKED else begin, end if MASKED else plain_end,
            first_key, prefix, table_ptr, k_ptr, v_ptr, scale,
            k_stride_block, k_stride_slot, v_stride_block, v_stride_slot,
            D, BLOCK_SIZE, BLOCK_N, MASKED, PRODUCT,
        )  # fmt: skip

    out = out / tl.where(total > 0, total, 1.0)[:, None] * value_scale
    own = tokens * out_stride + heads * D
    if SPLIT:
        first_part = (tile.to(tl.int64) * tl.num_programs(0) + kv_head) * tl.num_programs(1)
        if MERGES:
            if parts == 1:
                write_rows(out_ptr, own, out, wanted, columns)
            else:
                write_part(
                    parts_ptr,
                    log_sums_ptr,
                    first_part + split,
                    out,
                    peak,
                    total,
                    wanted,
                    D,
                    BLOCK_M,
                )
                tl.debug_barrier()  # all threads have written before one says so
                counter_ptr = counters_ptr + tile * tl.num_programs(0) + kv_head
                if tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == parts - 1:
                    merged = merge_parts(
                        parts_ptr, log_sums_ptr, first_part, parts, wanted, D, BLOCK_M, MAX_SPLITS
                    )
                    write_rows(out_ptr, own, merged, wanted, columns)
                    tl.store(counter_ptr, 0)  # for the next launch
        else:
            write_part(
                parts_ptr, log_sums_ptr, first_part + split, out, peak, total, wanted, D, BLOCK_M
            )
    else:
        write_rows(out_ptr, own, out, wanted, columns)


@triton.jit
def attend_steps(
    out, peak, total, q, queries, ancestors, causal, tree, begin, end, first_key, prefix,
    table_ptr, k_ptr, v_ptr, scale, k_stride_block, k_stride_slot, v_stride_block, v_stride_slot,
    D: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
    PRODUCT: tl.constexpr,
):  # fmt: skip
    """Add the keys of steps begin .. end-1: `out` [BLOCK_M, D] sums values weighted by
    2^(score - peak), `total` the weights. Without MASKED all queries see all of these keys."""
    columns = tl.arange(0, D)
    end_key = first_key + end * BLOCK_N
    # Blocks are looked up one step ahead. If the step that uses them looked them up, the compiler
    # would spend its pipeline stages on the lookup and prefetch no keys.
    keys_at = first_key + begin * BLOCK_N + tl.arange(0, BLOCK_N)
    blocks = find_blocks(table_ptr, keys_at, end_key, prefix, causal, tree, BLOCK_SIZE, MASKED)
    for step in range(begin, end):
        keys_at = first_key + step * BLOCK_N + tl.arange(0, BLOCK_N)
        next_blocks = find_blocks(
            table_ptr, keys_at + BLOCK_N, end_key, prefix, causal, tree, BLOCK_SIZE, MASKED
        )
        entries = keys_at - prefix  # index in the suffix; negative in the prefix
        slots = keys_at % BLOCK_SIZE
        k_ptrs = (blocks * k_stride_block + slots * k_stride_slot)[:, None] + columns[None, :]
        v_ptrs = (blocks * v_stride_block + slots * v_stride_slot)[:, None] + columns[None, :]
        if MASKED:
            seen = is_seen(entries, causal, tree)  # other keys may hold NaN
            keys = tl.load(k_ptr + k_ptrs, mask=seen[:, None], other=0.0)
            values = tl.load(v_ptr + v_ptrs, mask=seen[:, None], other=0.0)
        else:
            keys = tl.load(k_ptr + k_ptrs)
            values = tl.load(v_ptr + v_ptrs)
        keys = tl.trans(keys.to(q.dtype)).to(PRODUCT)
        scores = tl.dot(q.to(PRODUCT), keys, input_precision="ieee") * scale  # [BLOCK_M, BLOCK_N]
        if MASKED:
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
    return out, peak, total


@triton.jit
def merge_splits(
    out_ptr,  # [T, Hq * D]
    parts_ptr,  # [tiles, Hkv, splits, BLOCK_M, D] float32
    log_sums_ptr,  # [tiles, Hkv, splits, BLOCK_M] float32
    cu_q_ptr,  # [B + 1] int32
    num_rows,
    tiles_per_row,
    fewest,
    most,
    num_splits,
    out_stride,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    MERGED_ROWS: tl.constexpr,
    MAX_SPLITS: tl.constexpr,  # a power of 2, at least num_splits
    SEARCH: tl.constexpr,
):
    """Merge the parts of MERGED_ROWS rows of a tile. Grid (groups of rows, Hkv, tiles)."""
    await_inputs()
    kv_head, tile = tl.program_id(1), tl.program_id(2)
    row, first_query = find_tile(tile, cu_q_ptr, num_rows, tiles_per_row, BLOCK_M // GROUP, SEARCH)
    start = tl.load(cu_q_ptr + row)
    count = tl.load(cu_q_ptr + row + 1) - start
    first_row = tl.program_id(0) * MERGED_ROWS
    if (count < fewest) | (count > most) | (first_query + first_row // GROUP >= count):
        return
    rows = first_row + tl.arange(0, MERGED_ROWS)
    queries = first_query + rows // GROUP
    wanted = (rows < BLOCK_M // GROUP * GROUP) & (queries < count)  # [MERGED_ROWS]
    splits = tl.arange(0, MAX_SPLITS)
    first_part = (tile.to(tl.int64) * tl.num_programs(1) + kv_head) * num_splits
    part_rows = (first_part + splits)[:, None] * BLOCK_M + rows[None, :]
    log_sums = tl.load(
        log_sums_ptr + part_rows,
        mask=(splits < num_splits)[:, None] & wanted[None, :],
        other=float("-inf"),
    )  # [MAX_SPLITS, MERGED_ROWS]
    columns = tl.arange(0, D)
    parts = tl.load(
        parts_ptr + part_rows[:, :, None] * D + columns[None, None, :],
        mask=(log_sums > float("-inf"))[:, :, None],  # an empty part was not written
        other=0.0,
    )
    peak = tl.max(log_sums, axis=0)
    weights = tl.exp2(log_sums - tl.where(wanted, peak, 0.0)[None, :])
    total = tl.where(wanted, tl.sum(weights, axis=0), 1.0)
    out = tl.sum(parts * weights[:, :, None], axis=0) / total[:, None]
    targets = (start + queries).to(tl.int64) * out_stride + (kv_head * GROUP + rows % GROUP) * D
    out_ptrs = out_ptr + targets[:, None] + columns[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=wanted[:, None])


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
    for launch in _launches_of(q, k_cache, v_cache, meta, factors, out, _num_processors(q.device)):
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
    values, log_sums = parts or (None, None)
    # The interpreter cannot multiply bfloat16.
    exact = q.dtype == torch.float32 or q.device.type == "cpu"
    kept = ", fp8 cache" if k_cache.dtype is FP8 else ""
    return Launch(
        name=f"attend_splits[{_name(plan, group, D)}{kept}]",
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
            "GROUP": group,
            "D": D,
            "BLOCK_SIZE": k_cache.shape[1],
            "BLOCK_N": plan.block_n,
            "MIN_STEPS": MIN_SPLIT_KEYS // plan.block_n,
            "FEW_STEPS": _FEW_STEPS,
            "SPLIT": parts is not None,
            "MERGES": plan.merges,
            "MAX_SPLITS": triton.next_power_of_2(plan.num_splits) if plan.merges else 1,
            "PRODUCT": tl.float32 if exact else tl.bfloat16,
        },
        num_warps=plan.num_warps,
        num_stages=4 if plan.block_m < 64 else 3,
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
    if plan.merges:
        words.append(f"merges<={triton.next_power_of_2(plan.num_splits)}")
    return ", ".join(words)


# SmolLM2, Llama 8B, an eighth of 70B and of Llama 4
_KNOWN_HEADS = ((9, 3, 64), (32, 8, 128), (8, 1, 128), (5, 1, 128))
_FP8_HEADS = ((9, 3, 64), (8, 1, 128))  # of these, also with caches in FP8
_KNOWN_BATCHES = (  # rows, queries of each or None for a mixed batch, context
    (1, 1, 8192),
    (64, 1, 8192),
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
