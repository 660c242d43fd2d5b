"""Native operations against the torch references, in odd shapes, and against themselves in other
batches: no bit of an output may depend on its neighbours."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels.activation import reference as activation
from kernels.attention import reference as attention
from kernels.kv import reference as kv
from kernels.linear import reference as linear
from kernels.native.ops import NativeOps
from kernels.norm import reference as norm
from kernels.ops import AttentionMeta, LinearWeight, Ops
from kernels.rope import reference as rope
from kernels.sampling import reference as sampling

# Largest absolute error for values of order one: float32 sums in another order.
TOLERANCE = {"linear": 2e-5, "norm": 2e-5, "rope": 1e-6, "attention": 1e-5, "activation": 1e-6}
ROUNDED_ATTENTION = 2e-2  # queries and softmax weights are rounded to bfloat16 there
BFLOAT16_STEP = 2**-8  # relative distance of neighbouring numbers


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize(
    ("N", "K"), [(1, 1), (16, 32), (17, 33), (128, 64), (131, 575), (300, 1536), (2050, 96)]
)
@pytest.mark.parametrize("M", [1, 2, 5, 12, 13, 16, 17, 32, 33, 70])
def test_linear_equals_the_reference(
    native: Ops, dtype: torch.dtype, M: int, N: int, K: int, bias: bool
) -> None:
    x, weight = numbers(M, K), numbers(N, K, seed=1, dtype=dtype) / K**0.5
    offset = numbers(N, seed=2) if bias else None
    got = native.linear(x, native.pack_linear(weight, offset))
    if native.backends["linear"].reason is not None:
        x = x.bfloat16().float()  # special instructions multiply bfloat16 inputs
    expected = linear.linear(x, LinearWeight(weight, offset, N, K))
    torch.testing.assert_close(got, expected, atol=TOLERANCE["linear"], rtol=0)


@pytest.mark.parametrize(("N", "K"), [(300, 575), (49, 1536)])
def test_a_row_of_a_linear_is_the_same_in_every_batch(
    native: Ops, dtype: torch.dtype, N: int, K: int
) -> None:
    x, weight = numbers(70, K), native.pack_linear(numbers(N, K, seed=1, dtype=dtype), None)
    alone = torch.cat([native.linear(x[row : row + 1], weight) for row in range(70)])
    for M in (2, 7, 12, 16, 31, 33, 64, 70):
        assert torch.equal(native.linear(x[:M].contiguous(), weight), alone[:M]), M


def test_embedding_finds_the_rows_of_a_packed_weight(native: Ops, dtype: torch.dtype) -> None:
    weight = numbers(131, 75, dtype=dtype)
    ids = torch.tensor([0, 130, 15, 16, 17, 130])
    got = native.embedding(ids, native.pack_linear(weight, None))
    assert torch.equal(got, weight[ids].float())


@pytest.mark.parametrize("H", [1, 16, 33, 576])
@pytest.mark.parametrize("T", [1, 17, 50])
def test_norms_equal_the_reference(native: Ops, T: int, H: int) -> None:
    x, residual, weight = numbers(T, H), numbers(T, H, seed=1), numbers(H, seed=2)
    expected_residual = residual.clone()
    expected = norm.add_rms_norm(x, expected_residual, weight, 1e-5)
    got = native.add_rms_norm(x, residual, weight, 1e-5)
    torch.testing.assert_close(got, expected, atol=TOLERANCE["norm"], rtol=1e-5)
    assert torch.equal(residual, expected_residual)
    plain = norm.rms_norm(x, weight, 1e-5)
    got = native.rms_norm(x, weight, 1e-5)
    torch.testing.assert_close(got, plain, atol=TOLERANCE["norm"], rtol=1e-5)


@pytest.mark.parametrize("F", [1, 16, 35, 1536])
def test_silu_and_mul_equals_the_reference(native: Ops, F: int) -> None:
    gate_up = numbers(37, 2 * F) * 20
    torch.testing.assert_close(
        native.silu_and_mul(gate_up),
        activation.silu_and_mul(gate_up),
        atol=TOLERANCE["activation"],
        rtol=1e-5,
    )


def test_silu_survives_extreme_values(native: Ops) -> None:
    gate = torch.tensor([[-1e4, -200.0, -88.0, 0.0, 88.0, 200.0, 1e4, -0.0]])
    got = native.silu_and_mul(torch.cat((gate, torch.ones_like(gate)), dim=1))
    expected = torch.tensor([[0.0, 0.0, 0.0, 0.0, 88.0, 200.0, 1e4, 0.0]])
    torch.testing.assert_close(got, expected, atol=1e-30, rtol=1e-6)


@pytest.mark.parametrize(("heads", "kv_heads", "D"), [(9, 3, 64), (2, 2, 10), (8, 1, 128)])
def test_rope_and_cache_write_equal_the_reference(
    native: Ops, dtype: torch.dtype, heads: int, kv_heads: int, D: int
) -> None:
    T = 21
    qkv = numbers(T, (heads + 2 * kv_heads) * D)
    cos_sin = numbers(64, D, seed=1)
    positions = torch.arange(T) * 3
    slots = torch.randperm(5 * 16, generator=torch.Generator().manual_seed(2))[:T]
    caches = [
        [torch.full((5, 16, kv_heads, D), torch.nan, dtype=dtype) for _ in "kv"] for _ in "ab"
    ]
    expected = rope.rope_kv_write(qkv, cos_sin, positions, slots, *caches[0])
    got = native.rope_kv_write(qkv, cos_sin, positions, slots, *caches[1])
    torch.testing.assert_close(got, expected, atol=TOLERANCE["rope"], rtol=1e-5)
    step = BFLOAT16_STEP if dtype is torch.bfloat16 else 1e-5
    for mine, theirs in zip(caches[1], caches[0], strict=True):
        torch.testing.assert_close(mine, theirs, atol=TOLERANCE["rope"], rtol=step, equal_nan=True)


def attention_tolerance(native: Ops) -> float:
    rounds = native.backends["attention"].reason is not None
    return ROUNDED_ATTENTION if rounds else TOLERANCE["attention"]


def paged(
    rows: list[tuple[int, int]], kv_heads: int, D: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, AttentionMeta]:
    """Caches for rows of (prefix, queries), scattered over shuffled blocks; the rest is NaN."""
    lengths = [prefix + queries for prefix, queries in rows]
    needed = [-(-length // 16) for length in lengths]
    order = torch.randperm(sum(needed) + 3, generator=torch.Generator().manual_seed(3)).tolist()
    tables = torch.zeros(len(rows), max(needed), dtype=torch.int32)
    keys = torch.full((len(order), 16, kv_heads, D), torch.nan, dtype=dtype)
    values = torch.full_like(keys, torch.nan)
    for row, (length, count) in enumerate(zip(lengths, needed, strict=True)):
        blocks = [order.pop() for _ in range(count)]
        tables[row, :count] = torch.tensor(blocks)
        for pages, seed in ((keys, 4), (values, 5)):
            content = numbers(length, kv_heads, D, seed=100 * seed + row, dtype=dtype)
            for position in range(length):
                pages[blocks[position // 16], position % 16] = content[position]
    counts = torch.tensor([0] + [queries for _, queries in rows])
    meta = AttentionMeta(
        cu_q=counts.cumsum(0).int(),
        prefix_lens=torch.tensor([prefix for prefix, _ in rows], dtype=torch.int32),
        first_keys=torch.zeros(len(rows), dtype=torch.int32),
        block_tables=tables,
        ancestors=torch.zeros(int(counts.sum()), dtype=torch.int64),
        max_q=max(queries for _, queries in rows),
        max_context=max(lengths),
    )
    return keys, values, meta


ROWS = {
    "decode": [(0, 1), (15, 1), (16, 1), (255, 1), (256, 1), (700, 1)],
    "one-long-decode": [(1300, 1)],
    "prefill": [(0, 1), (0, 17), (0, 300)],
    "mixed": [(5, 40), (33, 1), (256, 20), (513, 3), (0, 16)],
}


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
@pytest.mark.parametrize(
    ("heads", "kv_heads", "D"), [(9, 3, 64), (4, 4, 128), (8, 1, 64), (6, 2, 80), (3, 1, 24)]
)
def test_attention_equals_the_reference(
    native: Ops,
    dtype: torch.dtype,
    rows: list[tuple[int, int]],
    heads: int,
    kv_heads: int,
    D: int,
) -> None:
    keys, values, meta = paged(rows, kv_heads, D, dtype)
    q = numbers(len(meta.ancestors), heads, D)
    got = native.attention(q, keys, values, meta, D**-0.5)
    expected = attention.attention(q, keys, values, meta, D**-0.5)
    torch.testing.assert_close(got, expected, atol=attention_tolerance(native), rtol=1e-5)


def random_tree_masks(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    masks = [1]
    for node in range(1, count):
        parent = int(torch.randint(0, node, (1,), generator=generator))
        masks.append(masks[parent] | 1 << node)
    return [mask - (1 << 64) if mask >> 63 else mask for mask in masks]


def test_attention_over_trees_sees_prefix_ancestors_and_itself(
    native: Ops, dtype: torch.dtype
) -> None:
    rows = [(40, 64), (250, 7), (0, 12), (17, 30)]
    keys, values, meta = paged(rows, 3, 64, dtype)
    masks = [mask for row, (_, n) in enumerate(rows[:3]) for mask in random_tree_masks(n, row)]
    meta = replace(meta, ancestors=torch.tensor(masks + [0] * 30))
    q = numbers(len(meta.ancestors), 9, 64)
    got = native.attention(q, keys, values, meta, 0.125)
    expected = attention.attention(q, keys, values, meta, 0.125)
    torch.testing.assert_close(got, expected, atol=attention_tolerance(native), rtol=1e-5)


@pytest.mark.parametrize("length", [20, 300, 1100])
def test_a_query_is_the_same_alone_and_in_any_chunk(
    native: Ops, dtype: torch.dtype, length: int
) -> None:
    keys, values, meta = paged([(0, length)], 3, 64, dtype)
    q = numbers(length, 9, 64)
    whole = native.attention(q, keys, values, meta, 0.125)
    for start, end in ((length - 1, length), (length - 7, length), (length // 2, length // 2 + 1)):
        part = replace(
            meta,
            cu_q=torch.tensor([0, end - start], dtype=torch.int32),
            prefix_lens=torch.tensor([start], dtype=torch.int32),
            ancestors=torch.zeros(end - start, dtype=torch.int64),
        )
        got = native.attention(q[start:end].contiguous(), keys, values, part, 0.125)
        assert torch.equal(got, whole[start:end]), (start, end)


@pytest.mark.parametrize("V", [1, 15, 131, 49152])
def test_draws_equal_the_reference(bound: NativeOps, V: int) -> None:
    logits = numbers(64, V) * 3
    logits[:, 1::7] = -torch.inf
    seeds = torch.arange(64) * 7919 - 5
    keys = sampling.noise_keys(seeds, torch.arange(64))
    assert torch.equal(bound.gumbel_argmax(logits, keys), sampling.gumbel_argmax(logits, keys))
    assert torch.equal(bound.argmax(logits), sampling.argmax(logits))
    torch.testing.assert_close(bound.logsumexp(logits), sampling.logsumexp(logits))


def test_scores_are_those_of_the_native_sum(native: Ops, bound: NativeOps) -> None:
    logits, tokens = numbers(5, 131) * 3, torch.arange(5) * 7
    scores = native.score(logits, tokens, 4)
    normaliser = bound.logsumexp(logits)
    best = logits.topk(4, dim=1)
    assert torch.equal(scores.chosen, logits.gather(1, tokens[:, None])[:, 0] - normaliser)
    assert torch.equal(scores.top_ids, best.indices)
    assert torch.equal(scores.top, best.values - normaliser[:, None])


def test_nearly_flat_logits_draw_as_the_reference(bound: NativeOps) -> None:
    """Every token is a candidate, so the bound avoids few logarithms."""
    logits = numbers(32, 5000) * 1e-3
    keys = sampling.noise_keys(torch.arange(32), torch.full((32,), 10))
    assert torch.equal(bound.gumbel_argmax(logits, keys), sampling.gumbel_argmax(logits, keys))


def test_argmax_takes_the_lowest_of_equals(native: Ops) -> None:
    logits = torch.zeros(1, 100)
    logits[0, [40, 90]] = 1.0
    assert native.argmax(logits).item() == 40


def test_large_attention_heads_are_refused(native: Ops, dtype: torch.dtype) -> None:
    keys, values, meta = paged([(0, 1)], 1, 512, dtype)
    with pytest.raises(ValueError, match=r"heads of at most 256 .* not 512"):
        native.attention(numbers(1, 1, 512), keys, values, meta, 1.0)


def test_keys_before_the_first_are_not_read(native: Ops, dtype: torch.dtype) -> None:
    rows = [(300, 5), (40, 1), (1, 1), (700, 3)]
    keys, values, meta = paged(rows, 3, 64, dtype)
    first_keys = torch.tensor([270, 1, 1, 10], dtype=torch.int32)
    for row, first in enumerate(first_keys.tolist()):
        for position in range(first):
            block = int(meta.block_tables[row, position // 16])
            keys[block, position % 16] = values[block, position % 16] = torch.nan
    meta = replace(meta, first_keys=first_keys)
    q = numbers(len(meta.ancestors), 9, 64)
    got = native.attention(q, keys, values, meta, 0.125)
    assert got.isfinite().all()
    expected = attention.attention(q, keys, values, meta, 0.125)
    torch.testing.assert_close(got, expected, atol=attention_tolerance(native), rtol=1e-5)


def test_a_level_of_a_tree_sees_entries_of_earlier_levels(native: Ops, dtype: torch.dtype) -> None:
    """Nodes 3 .. 5 are the queries; earlier forwards wrote the KV of nodes 0 .. 2."""
    keys, values, whole = paged([(20, 6)], 3, 64, dtype)
    masks = [0b1, 0b11, 0b101, 0b1011, 0b11, 0b100101]
    q = numbers(6, 9, 64)
    whole = replace(whole, ancestors=torch.tensor(masks))
    expected = native.attention(q, keys, values, whole, 0.125)
    level = replace(
        whole,
        cu_q=torch.tensor([0, 3], dtype=torch.int32),
        ancestors=torch.tensor(masks[3:]),
        max_q=3,
    )
    for ops in (native.attention, attention.attention):
        got = ops(q[3:].contiguous(), keys, values, level, 0.125)
        torch.testing.assert_close(got, expected[3:], atol=attention_tolerance(native), rtol=1e-5)


def test_kv_move_equals_the_reference(native: Ops, dtype: torch.dtype) -> None:
    pages = [numbers(4, 16, 3, 64, seed=seed, dtype=dtype) for seed in range(6)]
    expected = [page.clone() for page in pages]
    sources, targets = torch.tensor([5, 9, 12, 40]), torch.tensor([5, 6, 7, 33])
    kv.kv_move(expected, sources, targets)
    native.kv_move(pages, sources, targets)
    for got, wanted in zip(pages, expected, strict=True):
        assert torch.equal(got, wanted)


def test_inputs_need_not_be_contiguous(native: Ops, dtype: torch.dtype) -> None:
    """Kernels read raw memory; a broadcast row or a transposed matrix is copied first."""
    weight = native.pack_linear(numbers(20, 33, seed=1, dtype=dtype), None)
    row = numbers(1, 33)
    spread = row.expand(5, 33)
    assert torch.equal(native.linear(spread, weight), native.linear(row, weight).expand(5, 20))
    ones = torch.ones(33)
    assert torch.equal(
        native.rms_norm(spread, ones, 1e-5), native.rms_norm(row, ones, 1e-5).expand(5, 33)
    )
    turned = numbers(40, 6).T
    assert torch.equal(native.silu_and_mul(turned), native.silu_and_mul(turned.contiguous()))
    assert torch.equal(native.argmax(turned), turned.argmax(dim=1))
    ids = torch.tensor([[3, 5], [7, 1]]).T.flatten()[::2]
    assert torch.equal(native.embedding(ids, weight), native.embedding(ids.clone(), weight))
