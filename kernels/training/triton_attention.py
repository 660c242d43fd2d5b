"""Attention of unrolled entries in Triton, with gradients: each query sees a range of true entries,
and its own entry of each later step. Scores never leave the chip.

Row r sees the keys first[r] to last[r], and J entries of its own. Texts may lie one after the
other, so that nothing is padded: the programs of a block of rows read only the keys between the
block's lowest first and highest last one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.triton_launch import Launch
from kernels.triton_overlap import await_inputs

ROWS, KEYS = 64, 64  # of one tile
_FAR = tl.constexpr(2**30)  # beyond every key


@triton.jit
def _tile(ptr, place, step, column, inside, D: tl.constexpr):
    """[N, D] rows at `place`, `step` values apart; zeros where `inside` is false."""
    at = ptr + place.to(tl.int64)[:, None] * step + column[None, :]
    return tl.load(at, mask=inside[:, None] & (column < D)[None, :], other=0.0)


@triton.jit
def _scores(queries, keys, place, first, last, scale, PRODUCT: tl.constexpr):
    """[M, N] scores, -inf where a row does not see a key."""
    scores = tl.dot(queries.to(PRODUCT), tl.trans(keys.to(PRODUCT)), input_precision="ieee") * scale
    seen = (place[None, :] >= first[:, None]) & (place[None, :] <= last[:, None])
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def _own_rows(first_ptr, last_ptr, R, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """The program's rows of [B * R], which of them exist, the keys that each sees, and the range of
    tiles of keys that some of them see."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < R
    row = tl.program_id(2) * R + row
    first = tl.load(first_ptr + row, mask=inside, other=_FAR)
    last = tl.load(last_ptr + row, mask=inside, other=-1)
    low = tl.min(first, axis=0) // KEYS * KEYS
    return row, inside, first, last, low, tl.max(last, axis=0) + 1


@triton.jit
def _entries(k_ptr, v_ptr, at, kv_head, column, exist, HKV: tl.constexpr, D: tl.constexpr):
    """Keys and values [N, BLOCK_D] of one KV head at places `at`, zeros where none exist."""
    keys = _tile(k_ptr + kv_head * D, at, HKV * D, column, exist, D)
    values = _tile(v_ptr + kv_head * D, at, HKV * D, column, exist, D)
    return keys, values


@triton.jit(do_not_specialize=["R", "S", "J"])  # they change with every batch and step
def _forward_kernel(
    q_ptr,  # [B, R, Hq, D]
    k_ptr,  # [B, S, Hkv, D]
    v_ptr,
    own_k_ptr,  # [J, B, R, Hkv, D]
    own_v_ptr,
    first_ptr,  # [B, R] int32
    last_ptr,
    out_ptr,  # [B, R, Hq, D]
    lse_ptr,  # [B, R, Hq] float32, log of the sum of exp(scores)
    scale,
    R,
    S,
    J,
    HQ: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    PRODUCT: tl.constexpr,
):
    await_inputs()
    head, text = tl.program_id(1), tl.program_id(2)
    kv_head = head // (HQ // HKV)
    row, inside, first, last, low, high = _own_rows(first_ptr, last_ptr, R, ROWS, KEYS)
    column = tl.arange(0, BLOCK_D)
    queries = _tile(q_ptr + head * D, row, HQ * D, column, inside, D)
    most = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for start in range(low, high, KEYS):
        place = start + tl.arange(0, KEYS)
        at = text * S + place
        keys, values = _entries(k_ptr, v_ptr, at, kv_head, column, place < S, HKV, D)
        scores = _scores(queries, keys, place, first, last, scale, PRODUCT)
        higher = tl.maximum(most, tl.max(scores, axis=1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)  # rows that have seen nothing yet
        weights = tl.exp(scores - safe[:, None])
        shrink = tl.exp(most - safe)
        total = total * shrink + tl.sum(weights, axis=1)
        mixed = mixed * shrink[:, None]
        mixed += tl.dot(
            weights.to(values.dtype).to(PRODUCT), values.to(PRODUCT), input_precision="ieee"
        )
        most = higher
    for step in range(J):
        at = tl.num_programs(2) * R * step + row
        key, value = _entries(own_k_ptr, own_v_ptr, at, kv_head, column, inside, HKV, D)
        score = tl.sum(queries.to(tl.float32) * key.to(tl.float32), axis=1) * scale
        higher = tl.maximum(most, score)
        weight, shrink = tl.exp(score - higher), tl.exp(most - higher)
        total = total * shrink + weight
        mixed = mixed * shrink[:, None] + weight[:, None] * value.to(tl.float32)
        most = higher
    out = out_ptr + head * D + row.to(tl.int64)[:, None] * (HQ * D) + column[None, :]
    kept = inside[:, None] & (column < D)[None, :]
    tl.store(out, (mixed / total[:, None]).to(out_ptr.dtype.element_ty), mask=kept)
    tl.store(lse_ptr + row.to(tl.int64) * HQ + head, most + tl.log(total), mask=inside)


@triton.jit(do_not_specialize=["R", "S", "J"])
def _query_gradient_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    own_k_ptr,
    own_v_ptr,
    first_ptr,
    last_ptr,
    out_ptr,
    lse_ptr,
    slope_ptr,  # [B, R, Hq, D], the gradient of `out`
    delta_ptr,  # [B, R, Hq] float32, written: the sum of slope * out
    q_slope_ptr,  # [B, R, Hq, D], written
    own_k_slope_ptr,  # [J, B, R, Hq, D], written: of each query head
    own_v_slope_ptr,
    scale,
    R,
    S,
    J,
    HQ: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    PRODUCT: tl.constexpr,
):
    await_inputs()
    head, text = tl.program_id(1), tl.program_id(2)
    kv_head = head // (HQ // HKV)
    row, inside, first, last, low, high = _own_rows(first_ptr, last_ptr, R, ROWS, KEYS)
    column = tl.arange(0, BLOCK_D)
    queries = _tile(q_ptr + head * D, row, HQ * D, column, inside, D)
    slope = _tile(slope_ptr + head * D, row, HQ * D, column, inside, D)
    out = _tile(out_ptr + head * D, row, HQ * D, column, inside, D)
    lse = tl.load(lse_ptr + row.to(tl.int64) * HQ + head, mask=inside, other=0.0)
    delta = tl.sum(slope.to(tl.float32) * out.to(tl.float32), axis=1)
    tl.store(delta_ptr + row.to(tl.int64) * HQ + head, delta, mask=inside)
    rise = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for start in range(low, high, KEYS):
        place = start + tl.arange(0, KEYS)
        at = text * S + place
        keys, values = _entries(k_ptr, v_ptr, at, kv_head, column, place < S, HKV, D)
        weights = tl.exp(_scores(queries, keys, place, first, last, scale, PRODUCT) - lse[:, None])
        towards = tl.dot(slope.to(PRODUCT), tl.trans(values.to(PRODUCT)), input_precision="ieee")
        change = weights * (towards - delta[:, None])
        rise += tl.dot(change.to(keys.dtype).to(PRODUCT), keys.to(PRODUCT), input_precision="ieee")
    kept = inside[:, None] & (column < D)[None, :]
    for step in range(J):
        at = tl.num_programs(2) * R * step + row
        key, value = _entries(own_k_ptr, own_v_ptr, at, kv_head, column, inside, HKV, D)
        key, value = key.to(tl.float32), value.to(tl.float32)
        score = tl.sum(queries.to(tl.float32) * key, axis=1) * scale
        weight = tl.exp(score - lse)
        change = weight * (tl.sum(slope.to(tl.float32) * value, axis=1) - delta)
        rise += change[:, None] * key
        to = at.to(tl.int64)[:, None] * (HQ * D) + head * D + column[None, :]
        to_key = change[:, None] * scale * queries.to(tl.float32)
        to_value = weight[:, None] * slope.to(tl.float32)
        tl.store(own_k_slope_ptr + to, to_key.to(own_k_slope_ptr.dtype.element_ty), mask=kept)
        tl.store(own_v_slope_ptr + to, to_value.to(own_v_slope_ptr.dtype.element_ty), mask=kept)
    to = q_slope_ptr + head * D + row.to(tl.int64)[:, None] * (HQ * D) + column[None, :]
    tl.store(to, (rise * scale).to(q_slope_ptr.dtype.element_ty), mask=kept)


@triton.jit(do_not_specialize=["R", "S"])
def _key_gradient_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    first_ptr,
    last_ptr,
    lse_ptr,
    slope_ptr,
    delta_ptr,
    begin_ptr,  # [B, tiles of keys] int32: rows from `begin` on, before `end`, see keys of the tile
    end_ptr,
    k_slope_ptr,  # [B, S, Hkv, D], written
    v_slope_ptr,
    scale,
    R,
    S,
    HQ: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    PRODUCT: tl.constexpr,
):
    await_inputs()
    kv_head, text = tl.program_id(1), tl.program_id(2)
    place, column = tl.program_id(0) * KEYS + tl.arange(0, KEYS), tl.arange(0, BLOCK_D)
    keys, values = _entries(k_ptr, v_ptr, text * S + place, kv_head, column, place < S, HKV, D)
    tile = text * tl.num_programs(0) + tl.program_id(0)
    begin, end = tl.load(begin_ptr + tile), tl.load(end_ptr + tile)
    to_keys = tl.zeros((KEYS, BLOCK_D), tl.float32)
    to_values = tl.zeros((KEYS, BLOCK_D), tl.float32)
    for member in range(HQ // HKV):
        head = kv_head * (HQ // HKV) + member
        for start in range(begin, end, ROWS):
            row = start + tl.arange(0, ROWS)
            inside = row < end
            row = text * R + row
            first = tl.load(first_ptr + row, mask=inside, other=_FAR)
            last = tl.load(last_ptr + row, mask=inside, other=-1)
            queries = _tile(q_ptr + head * D, row, HQ * D, column, inside, D)
            slope = _tile(slope_ptr + head * D, row, HQ * D, column, inside, D)
            at = row.to(tl.int64) * HQ + head
            lse = tl.load(lse_ptr + at, mask=inside, other=0.0)
            delta = tl.load(delta_ptr + at, mask=inside, other=0.0)
            weights = tl.exp(
                _scores(queries, keys, place, first, last, scale, PRODUCT) - lse[:, None]
            )
            narrow = weights.to(slope.dtype).to(PRODUCT)
            to_values += tl.dot(tl.trans(narrow), slope.to(PRODUCT), input_precision="ieee")
            towards = tl.dot(
                slope.to(PRODUCT), tl.trans(values.to(PRODUCT)), input_precision="ieee"
            )
            change = (weights * (towards - delta[:, None])).to(queries.dtype).to(PRODUCT)
            to_keys += tl.dot(tl.trans(change), queries.to(PRODUCT), input_precision="ieee")
    to = (text * S + place).to(tl.int64)[:, None] * (HKV * D) + kv_head * D + column[None, :]
    kept = (place < S)[:, None] & (column < D)[None, :]
    tl.store(k_slope_ptr + to, (to_keys * scale).to(k_slope_ptr.dtype.element_ty), mask=kept)
    tl.store(v_slope_ptr + to, to_values.to(v_slope_ptr.dtype.element_ty), mask=kept)


@dataclass(frozen=True, slots=True)
class _Problem:
    """Inputs of attention, contiguous."""

    queries: Tensor  # [B, R, Hq, D]
    keys: Tensor  # [B, S, Hkv, D]
    values: Tensor
    own_keys: Tensor  # [J, B, R, Hkv, D]
    own_values: Tensor
    first: Tensor  # [B, R] int32
    last: Tensor

    def launch(self, name: str, kernel: Any, tiles: int, own: bool, **more: Any) -> Launch:
        """A launch over (tiles, heads, texts) with this problem's tensors and sizes; with `own`
        entries, of query heads."""
        num_heads, num_kv_heads, dim = self.queries.shape[2], *self.keys.shape[2:]
        return Launch(
            name=f"training_attention_{name}[heads={num_heads}/{num_kv_heads}x{dim}]",
            kernel=kernel,
            grid=(tiles, num_heads if own else num_kv_heads, len(self.queries)),
            arguments=self._tensors(own) | self._sizes() | more,
            num_warps=4 if dim <= 64 else 8,
            num_stages=2,
        )

    def _tensors(self, own: bool) -> dict[str, Any]:
        shared = {
            "q_ptr": self.queries,
            "k_ptr": self.keys,
            "v_ptr": self.values,
            "first_ptr": self.first,
            "last_ptr": self.last,
        }
        of_rows = {
            "own_k_ptr": self.own_keys,
            "own_v_ptr": self.own_values,
            "J": len(self.own_keys),
        }
        return shared | of_rows if own else shared

    def _sizes(self) -> dict[str, Any]:
        dim = self.keys.shape[3]
        # The interpreter cannot multiply bfloat16.
        exact = self.queries.dtype == torch.float32 or self.queries.device.type == "cpu"
        return {
            "scale": dim**-0.5,
            "R": self.queries.shape[1],
            "S": self.keys.shape[1],
            "HQ": self.queries.shape[2],
            "HKV": self.keys.shape[2],
            "D": dim,
            "BLOCK_D": max(16, triton.next_power_of_2(dim)),
            "ROWS": ROWS,
            "KEYS": KEYS,
            "PRODUCT": tl.float32 if exact else tl.bfloat16,
        }


def attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    own: list[tuple[Tensor, Tensor]],
    first: Tensor,
    last: Tensor,
) -> Tensor:
    """Rotated queries [B, R, Hq, D], keys and values [B, S, Hkv, D], `own` pairs [B, R, Hkv, D]
    each -> [B, R, Hq, D]. Row r sees keys `first[r]` to `last[r]` ([B, R] int32, both included),
    and its own entry of each pair. Gradients flow to all but the ranges."""
    narrow = queries.dtype
    if own:
        own_keys = torch.stack([key.to(narrow) for key, _ in own])
        own_values = torch.stack([value.to(narrow) for _, value in own])
    else:
        own_keys = own_values = queries.new_empty(0, *queries.shape[:2], *keys.shape[2:])
    found: Tensor = _Attention.apply(  # type: ignore[no-untyped-call]
        queries, keys.to(narrow), values.to(narrow), own_keys, own_values, first, last
    )
    return found


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        problem = _Problem(*(tensor.contiguous() for tensor in tensors))
        out, lse = _results(problem)
        _forward(problem, out, lse).run()
        ctx.save_for_backward(*tensors, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, out, lse = ctx.saved_tensors
        problem = _Problem(*(tensor.contiguous() for tensor in tensors))
        slope, delta = slope.contiguous(), torch.empty_like(lse)
        to_queries, to_keys, to_values = map(torch.empty_like, tensors[:3])
        to_own = [_of_query_heads(problem) for _ in range(2)]
        _query_gradient(problem, out, lse, slope, delta, to_queries, *to_own).run()
        _key_gradient(problem, lse, slope, delta, to_keys, to_values).run()
        num_kv_heads = problem.keys.shape[2]
        summed = [one.unflatten(3, (num_kv_heads, -1)).sum(dim=4) for one in to_own]
        return to_queries, to_keys, to_values, *summed, None, None


def _results(problem: _Problem) -> tuple[Tensor, Tensor]:
    queries = problem.queries
    lse = torch.empty(queries.shape[:3], dtype=torch.float32, device=queries.device)
    return torch.empty_like(queries), lse


def _of_query_heads(problem: _Problem) -> Tensor:
    """[J, B, R, Hq, D], uninitialised."""
    return problem.queries.new_empty(len(problem.own_keys), *problem.queries.shape)


def _forward(problem: _Problem, out: Tensor, lse: Tensor) -> Launch:
    tiles = triton.cdiv(problem.queries.shape[1], ROWS)
    return problem.launch("forward", _forward_kernel, tiles, True, out_ptr=out, lse_ptr=lse)


def _query_gradient(
    problem: _Problem,
    out: Tensor,
    lse: Tensor,
    slope: Tensor,
    delta: Tensor,
    to_queries: Tensor,
    to_own_keys: Tensor,
    to_own_values: Tensor,
) -> Launch:
    return problem.launch(
        "queries",
        _query_gradient_kernel,
        triton.cdiv(problem.queries.shape[1], ROWS),
        own=True,
        out_ptr=out,
        lse_ptr=lse,
        slope_ptr=slope,
        delta_ptr=delta,
        q_slope_ptr=to_queries,
        own_k_slope_ptr=to_own_keys,
        own_v_slope_ptr=to_own_values,
    )


def _key_gradient(
    problem: _Problem, lse: Tensor, slope: Tensor, delta: Tensor, to_keys: Tensor, to_values: Tensor
) -> Launch:
    begin, end = _rows_of_tiles(problem.first, problem.last, problem.keys.shape[1])
    return problem.launch(
        "keys",
        _key_gradient_kernel,
        triton.cdiv(problem.keys.shape[1], KEYS),
        own=False,
        lse_ptr=lse,
        slope_ptr=slope,
        delta_ptr=delta,
        begin_ptr=begin,
        end_ptr=end,
        k_slope_ptr=to_keys,
        v_slope_ptr=to_values,
    )


def _rows_of_tiles(first: Tensor, last: Tensor, num_keys: int) -> tuple[Tensor, Tensor]:
    """For each tile of keys the rows, from begin on and before end, among which are all that see
    it; [B, tiles] int32 each. Few others are, since rows are sorted, apart from padding."""
    starts = torch.arange(0, num_keys, KEYS, dtype=torch.int32, device=first.device)
    starts = starts.expand(len(first), -1).contiguous()
    highest = last.cummax(dim=1).values
    lowest = first.flip(1).cummin(dim=1).values.flip(1).contiguous()
    begin = torch.searchsorted(highest, starts, out_int32=True)
    end = torch.searchsorted(lowest, starts + (KEYS - 1), right=True, out_int32=True)
    return begin, end


def launches_of(
    num_rows: int, num_keys: int, num_heads: int, num_kv_heads: int, dim: int
) -> Iterator[Launch]:
    """The launches of one text of these sizes in bfloat16, over tensors of the `meta` device."""

    def some(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    queries, keys = some(1, num_rows, num_heads, dim), some(1, num_keys, num_kv_heads, dim)
    own = some(3, 1, num_rows, num_kv_heads, dim)
    ranges = some(1, num_rows, dtype=torch.int32)
    problem = _Problem(queries, keys, keys, own, own, ranges, ranges)
    out, lse = _results(problem)
    to_own = _of_query_heads(problem)
    yield _forward(problem, out, lse)
    yield _query_gradient(problem, out, lse, out, lse, queries, to_own, to_own)
    yield _key_gradient(problem, lse, out, lse, keys, keys)
