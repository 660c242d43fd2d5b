"""Native attention over trees: every node gets the bits of plain decoding, where the tokens of the
node's path are committed one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from kernels.attention import reference
from kernels.ops import AttentionMeta, Ops
from tests.kernels.native.test_native import attention_tolerance, numbers

PREFIXES = (0, 15, 16, 17, 31, *range(250, 261))
SIZES = (64, 5, 30, 64, 16, 3, 23)
BLOCK = 16


@dataclass(frozen=True)
class Row:
    """One row of a batch: `masks` over the entries after the prefix, 0 for none."""

    keys: Tensor  # [length, Hkv, D]
    values: Tensor
    prefix: int
    first_key: int
    masks: tuple[int, ...]
    queries: Tensor  # [len(masks), Hq, D]


def tree_masks(count: int, reach: int, seed: int) -> tuple[int, ...]:
    """Every parent is one of the `reach` nodes before: the smaller, the deeper the tree."""
    generator = torch.Generator().manual_seed(seed)
    masks = [1]
    for node in range(1, count):
        back = int(torch.randint(1, min(node, reach) + 1, (1,), generator=generator))
        masks.append(masks[node - back] | 1 << node)
    return tuple(masks)


def tree_row(
    prefix: int, masks: tuple[int, ...], shape: tuple[int, int, int], dtype: torch.dtype, first: int
) -> Row:
    heads, kv_heads, D = shape
    length, seed = prefix + max(len(masks), max(masks).bit_length()), prefix + len(masks)
    keys, values = (numbers(length, kv_heads, D, seed=seed + i, dtype=dtype) for i in range(2))
    return Row(keys, values, prefix, first, masks, numbers(len(masks), heads, D, seed=seed + 2))


def decodes(row: Row) -> list[Row]:
    """For each query, a row that decodes it plainly after the path that it sees."""
    rows = []
    for query, mask in zip(row.queries, row.masks, strict=True):
        path = [row.prefix + i for i in range(64) if mask >> i & 1]
        order = torch.tensor([*range(row.prefix), *path])
        length = len(order) - 1
        rows.append(
            Row(row.keys[order], row.values[order], length, row.first_key, (0,), query[None])
        )
    return rows


def attend(native: Ops, rows: Sequence[Row], reference_too: bool = False) -> Tensor:
    """[all queries, Hq * D], over caches of scattered blocks with NaN in unused slots."""
    _, kv_heads, D = rows[0].keys.shape
    counts = [-(-len(row.keys) // BLOCK) for row in rows]
    order = torch.randperm(sum(counts) + 1, generator=torch.Generator().manual_seed(3)).int()
    tables = torch.zeros(len(rows), max(counts), dtype=torch.int32)
    keys = torch.full((len(order), BLOCK, kv_heads, D), torch.nan, dtype=rows[0].keys.dtype)
    values = keys.clone()
    for row, blocks, table in zip(rows, torch.split(order[:-1], counts), tables, strict=True):
        table[: len(blocks)] = blocks
        at = torch.arange(len(row.keys))
        keys[blocks[at // BLOCK].long(), at % BLOCK] = row.keys
        values[blocks[at // BLOCK].long(), at % BLOCK] = row.values
    meta = AttentionMeta(
        cu_q=torch.tensor([0, *(len(row.masks) for row in rows)]).cumsum(0).int(),
        prefix_lens=torch.tensor([row.prefix for row in rows], dtype=torch.int32),
        first_keys=torch.tensor([row.first_key for row in rows], dtype=torch.int32),
        block_tables=tables,
        ancestors=torch.tensor([signed(mask) for row in rows for mask in row.masks]),
        max_q=max(len(row.masks) for row in rows),
        max_context=max(len(row.keys) for row in rows),
    )
    queries = torch.cat([row.queries for row in rows])
    attention = reference.attention if reference_too else native.attention
    return attention(queries, keys, values, meta, D**-0.5)


def signed(mask: int) -> int:
    return mask - (1 << 64) if mask >> 63 else mask


@pytest.mark.parametrize("shape", [(9, 3, 64), (4, 4, 128), (6, 2, 80), (3, 1, 24), (32, 1, 32)])
@pytest.mark.parametrize("reach", [64, 3], ids=["wide", "deep"])
def test_every_node_gets_the_bits_of_plain_decoding(
    native: Ops, dtype: torch.dtype, shape: tuple[int, int, int], reach: int
) -> None:
    trees = [
        tree_row(prefix, tree_masks(SIZES[i % len(SIZES)], reach, i), shape, dtype, 0)
        for i, prefix in enumerate(PREFIXES)
    ]
    expected = attend(native, [row for tree in trees for row in decodes(tree)])
    assert torch.equal(attend(native, trees), expected)
    alone = torch.cat([attend(native, [tree]) for tree in trees])
    assert torch.equal(alone, expected)


def asking(row: Row, nodes: slice, first_key: int) -> Row:
    """Only some nodes are queries; earlier forwards wrote the KV of the others."""
    return replace(row, masks=row.masks[nodes], queries=row.queries[nodes], first_key=first_key)


def test_a_level_with_a_window_gets_the_bits_of_plain_decoding(
    native: Ops, dtype: torch.dtype
) -> None:
    levels = []
    for prefix, first_key in ((40, 1), (270, 250), (252, 252), (511, 37), (5, 0)):
        tree = tree_row(prefix, tree_masks(64, 5, prefix), (9, 3, 64), dtype, 0)
        tree.keys[:first_key] = tree.values[:first_key] = torch.nan
        levels += [asking(tree, nodes, first_key) for nodes in (slice(7, 17), slice(60, 64))]
    levels.append(tree_row(20, (0, 0, 0), (9, 3, 64), dtype, 0))  # a prompt's chunk between them
    got = attend(native, levels)
    plain = [row for level in levels[:-1] for row in decodes(level)]
    assert torch.equal(got[:-3], attend(native, plain))
    tolerance = attention_tolerance(native)
    torch.testing.assert_close(got, attend(native, levels, True), atol=tolerance, rtol=1e-5)


def test_a_branch_without_finite_values_spoils_no_other(native: Ops, dtype: torch.dtype) -> None:
    """Nodes 1 and 3 are one branch, 2 and 4 the other."""
    tree = tree_row(100, (0b1, 0b11, 0b101, 0b1011, 0b10101), (16, 1, 64), dtype, 0)
    tree.keys[103] = tree.values[103] = torch.nan
    got = attend(native, [tree])
    assert got[3].isnan().all()
    assert torch.equal(got[[2, 4]], attend(native, decodes(tree))[[2, 4]])
