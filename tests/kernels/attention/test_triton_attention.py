"""Triton attention against the float32 reference, over shuffled pages and poisoned memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels.attention import reference
from kernels.attention.triton_plan import (
    MAX_PART_BYTES,
    MAX_SPLITS,
    Shape,
    choose_splits,
    plan_tiles,
)
from kernels.linear.scaled import FP8
from kernels.ops import AttentionMeta, CacheScales
from tests.kernels import triton_env
from tests.kernels.triton_env import DEVICE, numbers, poison, poisoned_memory

kernel = triton_env.load("kernels.attention.triton_kernel")
triton, tl = triton_env.load("triton"), triton_env.load("triton.language")
pytestmark = [*triton_env.MARKS, pytest.mark.usefixtures(poisoned_memory.__name__)]

# bfloat16 softmax weights carry an error of half a step each, relative to values of order one.
LOOSER = {torch.float32: {}, torch.bfloat16: {"atol": 2e-2}}
Rows = Sequence[tuple[int, int]]  # prefix and suffix length of each row
Caches = tuple[Tensor, Tensor]


def paged(
    rows: Rows, kv_heads: int, D: int, dtype: torch.dtype = torch.bfloat16
) -> tuple[Caches, AttentionMeta]:
    """Caches for rows of (prefix, queries), scattered over shuffled blocks; the rest is NaN."""
    needed = [-(-(prefix + queries) // 16) for prefix, queries in rows]
    blocks = torch.randperm(sum(needed) + 3, generator=torch.Generator().manual_seed(3))
    table = torch.full((len(rows), max(needed) + 2), 2**30, dtype=torch.int32)  # never to be read
    caches = (
        poison(len(blocks), 16, kv_heads, D, dtype=dtype),
        poison(len(blocks), 16, kv_heads, D, dtype=dtype),
    )
    places = torch.arange(16, device=DEVICE)
    for row, ((prefix, queries), count) in enumerate(zip(rows, needed, strict=True)):
        table[row, :count], blocks = blocks[:count].int(), blocks[count:]
        positions = torch.arange(prefix + queries, device=DEVICE)
        own = table[row].to(DEVICE).long()[positions // 16], places[positions % 16]
        for which, cache in enumerate(caches):
            cache[own] = numbers(len(positions), kv_heads, D, seed=2 * row + which, dtype=dtype)
    counts = torch.tensor([0] + [queries for _, queries in rows])
    return caches, AttentionMeta(
        cu_q=counts.cumsum(0).int().to(DEVICE),
        prefix_lens=torch.tensor([prefix for prefix, _ in rows]).int().to(DEVICE),
        first_keys=torch.zeros(len(rows), dtype=torch.int32, device=DEVICE),
        block_tables=table.to(DEVICE),
        ancestors=torch.zeros(int(counts.sum()), dtype=torch.int64, device=DEVICE),
        max_q=int(counts.max()),
        max_context=max(prefix + queries for prefix, queries in rows),
    )


def check(
    q: Tensor,
    caches: Caches,
    meta: AttentionMeta,
    scale: float | None = None,
) -> Tensor:
    scale = q.shape[2] ** -0.5 if scale is None else scale
    got = kernel.attention(q, *caches, meta, scale)
    owned = int(meta.cu_q[-1])
    safe = replace(meta, block_tables=meta.block_tables.clamp(max=len(caches[0]) - 1))
    expected = reference.attention(q[:owned].float(), *caches, safe, scale)
    assert got.dtype == q.dtype
    assert not kernel._counters(DEVICE).any()  # ready for the next launch
    triton_env.close(got[:owned], expected, **LOOSER[q.dtype])
    return got


@pytest.fixture
def many_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many splits as the keys allow."""
    monkeypatch.setattr(kernel, "_num_processors", lambda device: 132)


@pytest.mark.parametrize(
    ("rows", "heads", "kv_heads", "D", "dtype"),
    [
        ([(0, 1)], 2, 2, 64, torch.float32),
        ([(0, 1)], 4, 1, 128, torch.bfloat16),
        ([(15, 1), (16, 1), (17, 1)], 3, 1, 16, torch.float32),
        ([(15, 1), (16, 1), (17, 1)], 8, 1, 128, torch.float32),
        ([(1, 3), (15, 2), (40, 1)], 6, 2, 64, torch.bfloat16),
        ([(1000, 2)], 4, 1, 128, torch.bfloat16),
        ([(1000, 1)], 8, 1, 64, torch.float32),
    ],
)
def test_decoding_equals_the_reference(
    rows: Rows, heads: int, kv_heads: int, D: int, dtype: torch.dtype
) -> None:
    caches, meta = paged(rows, kv_heads, D)
    check(numbers(len(meta.ancestors), heads, D, seed=9, dtype=dtype), caches, meta)


@pytest.mark.parametrize(
    ("rows", "heads", "kv_heads", "dtype"),
    [
        ([(0, 17)], 4, 1, torch.float32),
        ([(5, 40), (33, 40)], 4, 1, torch.float32),  # all rows alike: long tiles only
        ([(0, 1), (70, 33), (0, 16)], 4, 1, torch.float32),  # short and long rows
        ([(40, 5), (3, 130)], 1, 1, torch.bfloat16),
    ],
)
def test_chunks_equal_the_reference(
    rows: Rows, heads: int, kv_heads: int, dtype: torch.dtype
) -> None:
    caches, meta = paged(rows, kv_heads, 64)
    check(numbers(len(meta.ancestors), heads, 64, seed=9, dtype=dtype), caches, meta)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_cache_of_fp8_equals_the_reference(dtype: torch.dtype) -> None:
    caches, meta = paged([(70, 3), (0, 40), (300, 1)], 2, 64, torch.float32)
    small = [page.float().to(FP8) for page in caches]
    q, scales = numbers(len(meta.ancestors), 4, 64, seed=9, dtype=dtype), CacheScales(0.37, 1.9)
    got = kernel.attention(q, *small, meta, 0.125, scales)
    safe = replace(meta, block_tables=meta.block_tables.clamp(max=len(small[0]) - 1))
    expected = reference.attention(q.float(), *small, safe, 0.125, scales)
    loose = {torch.float32: {}, torch.bfloat16: {"atol": 4e-2}}
    triton_env.close(got, expected, **loose[dtype])


def test_a_cache_of_float32_equals_the_reference() -> None:
    caches, meta = paged([(70, 3)], 2, 64, torch.float32)
    check(numbers(3, 4, 64, seed=9), caches, meta)


def tree_masks(count: int, seed: int) -> list[int]:
    """Ancestor masks of a random tree, as int64."""
    generator = torch.Generator().manual_seed(seed)
    masks = [1]
    for node in range(1, count):
        parent = int(torch.randint(0, node, (1,), generator=generator))
        masks.append(masks[parent] | 1 << node)
    return [mask - (1 << 64) if mask >> 63 else mask for mask in masks]


@pytest.mark.parametrize(
    ("rows", "heads"),
    [
        ([(40, 4), (0, 16)], 4),
        ([(127, 64)], 1),
        ([(63, 64), (0, 5), (17, 2)], 3),  # several tiles of one tree, and a causal row
    ],
)
def test_trees_see_prefix_ancestors_and_themselves(rows: Rows, heads: int) -> None:
    caches, meta = paged(rows, 1, 64)
    masks = [mask for row, (_, n) in enumerate(rows[:2]) for mask in tree_masks(n, row)]
    masks += [0] * (len(meta.ancestors) - len(masks))
    meta = replace(meta, ancestors=torch.tensor(masks, device=DEVICE))
    check(numbers(len(masks), heads, 64, seed=9), caches, meta)


@pytest.mark.parametrize("last", [31, 32, 63])
def test_a_level_of_a_tree_sees_entries_of_earlier_forwards(last: int) -> None:
    """Two queries; entries that neither sees are NaN or lie outside the table."""
    caches, meta = paged([(20, last + 1)], 1, 64)
    masks = [0b1001, 1 << last | 1]
    for cache in caches:
        for entry in set(range(last)) - {0, 3}:
            cache[meta.block_tables[0, (20 + entry) // 16].long(), (20 + entry) % 16] = torch.nan
    signed = [mask - (1 << 64) if mask >> 63 else mask for mask in masks]
    meta = replace(
        meta,
        cu_q=torch.tensor([0, 2], dtype=torch.int32, device=DEVICE),
        ancestors=torch.tensor(signed, device=DEVICE),
        max_q=2,
    )
    assert check(numbers(2, 4, 64, seed=9), caches, meta).isfinite().all()


def test_causal_and_tree_queries_may_share_a_row() -> None:
    caches, meta = paged([(30, 6)], 1, 64)
    meta = replace(meta, ancestors=torch.tensor([0, 0, 0b101, 0, 0b10001, 0], device=DEVICE))
    check(numbers(6, 4, 64, seed=9), caches, meta)


@pytest.mark.usefixtures("many_processors")
@pytest.mark.parametrize("queries", [1, 17])
def test_keys_before_the_first_are_not_read(queries: int) -> None:
    rows = [(300, queries), (40, 1), (1, 1)]
    caches, meta = paged(rows, 1, 64)
    first_keys = torch.tensor([130, 40, 1], dtype=torch.int32, device=DEVICE)
    for row, first in enumerate(first_keys.tolist()):
        for position in range(first):
            block = int(meta.block_tables[row, position // 16])
            for cache in caches:
                cache[block, position % 16] = torch.nan
    meta = replace(meta, first_keys=first_keys)
    check(numbers(len(meta.ancestors), 4, 64, seed=9), caches, meta)


@pytest.mark.usefixtures("many_processors")
@pytest.mark.parametrize(
    ("rows", "heads", "dtype"),
    [
        ([(400, 1), (0, 1), (130, 1)], 4, torch.float32),  # some parts of later rows are empty
        ([(127, 128)], 1, torch.float32),  # the first query sees no key of the second part
        ([(1000, 5)], 8, torch.bfloat16),
        ([(1000, 3), (5, 2), (200, 3)], 4, torch.float32),  # 8 parts, one and two
    ],
)
def test_parts_merge_into_the_reference(rows: Rows, heads: int, dtype: torch.dtype) -> None:
    caches, meta = paged(rows, 1, 64)
    check(numbers(len(meta.ancestors), heads, 64, seed=9, dtype=dtype), caches, meta)


@pytest.mark.usefixtures("many_processors")
@pytest.mark.parametrize("first_keys", [[0, 0, 0], [133, 0, 100]])
def test_keys_need_not_be_where_they_are_looked_for(first_keys: list[int]) -> None:
    caches, meta = paged([(1300, 1), (0, 1), (130, 1)], 1, 64)
    meta = replace(meta, first_keys=torch.tensor(first_keys, dtype=torch.int32, device=DEVICE))
    check(numbers(3, 4, 64, seed=9), caches, meta)


@pytest.mark.usefixtures("many_processors")
@pytest.mark.parametrize("counts", [[4, 2], [2, 4], [0, 4]])
@pytest.mark.parametrize("heads", [2, 4])
def test_queries_need_not_be_where_they_are_looked_for(counts: list[int], heads: int) -> None:
    """Trees of different sizes with padding after them: a row's queries may begin earlier than if
    all rows had as many as the largest."""
    caches, meta = paged(list(zip([500, 300], counts, strict=True)), 1, 64)
    masks = [mask for row, count in enumerate(counts) for mask in tree_masks(count, row)[:count]]
    masks += [0] * (8 - len(masks))
    meta = replace(meta, ancestors=torch.tensor(masks, device=DEVICE))
    check(numbers(8, heads, 64, seed=9), caches, meta)


@pytest.mark.parametrize("queries", [1, 20])
def test_rows_without_queries_are_passed_over(queries: int) -> None:
    """Padding rows of a captured batch: the kernel reads and writes nothing for them."""
    caches, meta = paged([(50, queries), (20, queries)], 1, 64)
    counts = [0, 0, queries, queries, 2 * queries, 2 * queries]
    tables = meta.block_tables[[0, 0, 0, 1, 1]].clone()
    tables[[0, 2, 4]] = 2**30
    meta = replace(
        meta,
        cu_q=torch.tensor(counts, dtype=torch.int32, device=DEVICE),
        prefix_lens=torch.tensor([0, 50, 7, 20, 0], dtype=torch.int32, device=DEVICE),
        first_keys=torch.zeros(5, dtype=torch.int32, device=DEVICE),
        block_tables=tables,
        ancestors=torch.zeros(2 * queries + 3, dtype=torch.int64, device=DEVICE),
    )
    got = check(numbers(2 * queries + 3, 4, 64, seed=9), caches, meta)
    assert got[2 * queries :].isnan().all()  # as it was before


@triton.jit
def find_tiles(found_ptr, tiles_ptr, cu_q_ptr, num_rows, TILE_QUERIES: tl.constexpr):  # noqa: ANN001, ANN201
    place = tl.program_id(0)
    tile = tl.load(tiles_ptr + place)
    row, query = kernel.find_tile(tile, cu_q_ptr, num_rows, 0, TILE_QUERIES, True)
    tl.store(found_ptr + 2 * place, row)
    tl.store(found_ptr + 2 * place + 1, query)


def test_a_tile_finds_its_row_among_many() -> None:
    counts = torch.arange(300) * 7 % 23  # queries of each row; some have none
    cu_q = torch.cat((torch.zeros(1), counts.cumsum(0))).int().to(DEVICE)
    begins = cu_q[:-1] // 8 + torch.arange(300, device=DEVICE)
    tiles = torch.tensor([0, 1, 128, 300, int(begins[-1]), int(begins[255])], device=DEVICE)
    found = torch.full((len(tiles), 2), -1, device=DEVICE)
    find_tiles[len(tiles),](found, tiles, cu_q, 300, 8)
    for tile, (row, query) in zip(tiles.tolist(), found.tolist(), strict=True):
        assert row == max(at for at in range(300) if begins[at] <= tile)
        assert query == 8 * (tile - int(begins[row]))


def test_every_query_has_its_tile() -> None:
    counts = (torch.arange(300) * 7 % 23).tolist()
    starts = [sum(counts[:row]) for row in range(301)]
    begins = [start // 8 + row for row, start in enumerate(starts)]
    for row, count in enumerate(counts):
        assert begins[row + 1] - begins[row] >= -(-count // 8)


def test_large_scores_do_not_overflow() -> None:
    caches, meta = paged([(200, 3)], 1, 64)
    check(numbers(3, 4, 64, seed=9), caches, meta, scale=100.0)


def test_strides_need_not_be_contiguous() -> None:
    (keys, values), meta = paged([(70, 2), (5, 2)], 2, 64)
    q = triton_env.spaced(numbers(4, 4, 64, seed=9))
    tables = torch.full((2, 40), 2**30, dtype=torch.int32, device=DEVICE)
    tables[:, : meta.block_tables.shape[1]] = meta.block_tables
    meta = replace(meta, block_tables=tables[:, : meta.block_tables.shape[1]])
    both = torch.stack((keys, values), dim=2)  # [num_blocks, S, 2, Hkv, D]
    apart = triton_env.spaced(values)
    check(q, (both[:, :, 0], both[:, :, 1]), meta)
    check(q, (keys, apart), meta)
    check(q.transpose(0, 2).contiguous().transpose(0, 2), (keys, values), meta)


def test_caches_may_hold_more_than_two_to_the_31_numbers() -> None:
    (keys, _), meta = paged([(20, 1)], 1, 64)
    stride = 2**31 // (len(keys) - 1) + 64 & ~63
    size = stride * (len(keys) - 1) + 16 * 64
    memory = torch.UntypedStorage(2 * size, device=DEVICE)  # only written pages take memory
    far = torch.tensor([], dtype=torch.bfloat16, device=DEVICE).set_(
        memory, 0, keys.shape, (stride, 64, 64, 1)
    )
    far.copy_(keys)
    blocks = meta.block_tables.clamp(max=len(keys) - 1)
    blocks[0, 0] = len(keys) - 1  # the last one, wherever the shuffle put it
    far[blocks[0, :2].long()] = numbers(2, 16, 1, 64, dtype=torch.bfloat16)
    check(numbers(1, 1, 64, seed=9), (far, far), replace(meta, block_tables=blocks))


@pytest.mark.parametrize(
    ("q", "cache", "message"),
    [
        ((1, 1, 80), (1, 16, 1, 80), r"head_dim 80 is not one of \(16, 32, 64, 128\)"),
        ((1, 1, 64), (1, 32, 1, 64), "block size 32 is not 16"),
        ((1, 65, 64), (1, 16, 1, 64), "65 query heads of a KV head, at most 64"),
    ],
)
def test_unsupported_shapes_are_refused(
    q: tuple[int, ...], cache: tuple[int, ...], message: str
) -> None:
    _, meta = paged([(0, 1)], 1, 64)
    with pytest.raises(ValueError, match=message):
        kernel.attention(numbers(*q), numbers(*cache), numbers(*cache), meta, 1.0)


@pytest.mark.parametrize(
    ("queries", "keys"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float16)],
)
def test_unsupported_types_are_refused(queries: torch.dtype, keys: torch.dtype) -> None:
    caches, meta = paged([(0, 1)], 1, 64, keys)
    with pytest.raises(ValueError, match=f"queries of {queries} with keys of {keys}"):
        kernel.attention(numbers(1, 1, 64, dtype=queries), *caches, meta, 1.0)


@pytest.mark.parametrize(
    ("programs", "places", "most", "splits"),
    [
        (8, 264, 64, 30),  # batch 1: 240 of 264 places
        (8, 264, 10, 10),  # a context too short for more
        (512, 264, 64, 1),  # batch 64: 1.94 waves
        (320, 264, 64, 3),  # batch 40: 1.2 waves, or 3.6
        (1, 264, 128, 116),  # one KV head: nearly the allowed maximum
        (128, 132, 64, 1),
        (5, 264, 0, 1),
        (0, 264, 9, 1),
    ],
)
def test_splits_fill_the_processors(programs: int, places: int, most: int, splits: int) -> None:
    assert choose_splits(programs, places, most) == splits


EIGHT_B = Shape(
    num_tokens=1,
    num_rows=1,
    max_q=1,
    max_context=8192,
    group=4,
    kv_heads=8,
    head_dim=128,
    num_processors=132,
)


@pytest.mark.parametrize(
    ("rows", "queries", "context", "block_m", "splits"),
    [
        (1, 1, 8192, 16, 30),
        (1, 1, 131072, 16, 30),
        (1, 1, 128, 16, 1),
        (1, 1, 129, 16, 2),
        (1, 8, 8192, 32, 30),
        (1, 16, 8192, 64, 30),
        (16, 1, 8192, 16, 4),  # four programs of a processor
        (64, 1, 8192, 16, 1),
        (64, 16, 8192, 64, 1),
        (1, 512, 8192, 128, 1),
        (1, 64, 131072, 128, 8),
    ],
)
def test_rows_of_one_kind_take_one_launch(
    rows: int, queries: int, context: int, block_m: int, splits: int
) -> None:
    shape = replace(
        EIGHT_B, num_tokens=rows * queries, num_rows=rows, max_q=queries, max_context=context
    )
    (plan,) = plan_tiles(shape)
    assert (plan.block_m, plan.num_splits) == (block_m, splits)
    assert (plan.fewest, plan.most, plan.search) == (0, queries, False)
    assert plan.tiles_per_row * (block_m // 4) >= queries
    assert plan.merges == (block_m == 16 and splits > 1)


@pytest.mark.parametrize(
    ("rows", "queries", "context", "step_keys", "splits"),
    [
        (1, 1, 8192, 64, 30),  # nearly two programs for each processor
        (1, 1, 300, 64, 3),
        (4, 1, 8192, 64, 8),
        (16, 1, 8192, 32, 4),  # many rows: four programs of a processor
        (1, 4, 8192, 64, 30),  # a small tree, which fills as few query rows
        (1, 8, 8192, 32, 30),  # a tree
    ],
)
def test_long_steps_are_for_few_rows(
    rows: int, queries: int, context: int, step_keys: int, splits: int
) -> None:
    shape = replace(
        EIGHT_B, num_tokens=rows * queries, num_rows=rows, max_q=queries, max_context=context
    )
    (plan,) = plan_tiles(shape)
    assert (plan.cut.step_keys, plan.num_splits, plan.early) == (step_keys, splits, True)
    (plan,) = plan_tiles(replace(shape, num_tokens=rows * queries - 1))
    (crowded,) = plan_tiles(replace(shape, fp8=True))
    assert crowded.cut.step_keys == (step_keys if queries == 1 else 32)
    assert plan.early == (queries > 1)  # a lone query may not be where it is looked for


def test_many_parts_of_few_heads_take_no_launch_to_average() -> None:
    (plan,) = plan_tiles(replace(EIGHT_B, kv_heads=1, max_context=131072))
    assert plan.num_splits > 100
    assert plan.merges  # most contexts have few


def test_short_and_long_rows_are_shared_out() -> None:
    mixed = replace(EIGHT_B, num_tokens=512 + 63, num_rows=64, max_q=512)
    short, long = plan_tiles(mixed)
    assert (short.fewest, short.most, short.num_tiles) == (0, 16, 64)
    assert (long.fewest, long.most, long.search) == (17, 512, True)
    assert long.num_tiles == 575 // 32 + 64


@pytest.mark.parametrize("rows", [1, 7, 256])
@pytest.mark.parametrize("kv_heads", [1, 8])
@pytest.mark.parametrize("max_q", [1, 20, 512])
def test_scratch_is_bounded(rows: int, kv_heads: int, max_q: int) -> None:
    shape = replace(
        EIGHT_B,
        num_tokens=rows + max_q - 1,
        num_rows=rows,
        max_q=max_q,
        max_context=131072,
        kv_heads=kv_heads,
    )
    for plan in plan_tiles(shape):
        parts = plan.num_tiles * kv_heads * plan.num_splits
        assert 1 <= plan.num_splits <= MAX_SPLITS
        assert plan.num_splits == 1 or 4 * parts * plan.block_m * 128 <= MAX_PART_BYTES
