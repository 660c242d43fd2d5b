"""Draft trees in Triton: the results of `reference.py`, with equal integers.

Choices are made on int64 keys that order by score, then by lower index. The best n of a tile are
found one after the other, which is quick for the few that a tree needs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.sampling.triton_functions import NO_KEY, packed_key
from kernels.triton_launch import Launch
from kernels.triton_overlap import await_inputs

MAX_NODES = 64  # one 64-bit ancestor mask per node
MAX_CANDIDATES = 4096


@triton.jit
def _load_keys(scores_ptr, lanes, count):
    """Keys that order the first `count` scores and hold their indices; NO_KEY in other lanes."""
    inside = lanes < count
    scores = tl.load(scores_ptr + lanes, mask=inside, other=0.0)
    return tl.where(inside, packed_key(scores, lanes), NO_KEY)


@triton.jit
def _select_kernel(
    tokens_ptr,  # [B, C] int64 contiguous, and so are the next two
    parents_ptr,
    scores_ptr,  # float32
    root_tokens_ptr,  # [B] int64
    limits_ptr,  # [B] int64
    out_tokens_ptr,  # [B, num_nodes] int64 out
    out_parents_ptr,  # [B, num_nodes] int64 out
    C,
    num_nodes,
    CANDIDATES: tl.constexpr,  # a power of two, at least C
    NODES: tl.constexpr,  # a power of two, at least num_nodes
):
    """The best candidates of one row as a tree, grid (B,)."""
    await_inputs()
    row = tl.program_id(0).to(tl.int64)
    limit = tl.maximum(tl.minimum(tl.load(limits_ptr + row), num_nodes), 1).to(tl.int32)
    lanes = tl.arange(0, CANDIDATES)
    inside = lanes < C
    keys = _load_keys(scores_ptr + row * C, lanes, C)
    left = keys
    for _ in range(1, limit):
        left = tl.where(left == tl.max(left, axis=0), NO_KEY, left)
    chosen = inside & (left == NO_KEY)
    nodes = tl.cumsum(chosen.to(tl.int32), axis=0)  # number of each chosen one, in order, from 1
    parents = tl.load(parents_ptr + row * C + lanes, mask=inside, other=-1).to(tl.int32)
    above = tl.gather(nodes, tl.maximum(parents, 0), axis=0)
    above = tl.where(parents < 0, 0, above)
    tokens = tl.load(tokens_ptr + row * C + lanes, mask=inside, other=0)
    first = row * num_nodes
    tl.store(out_tokens_ptr + first, tl.load(root_tokens_ptr + row))
    tl.store(out_parents_ptr + first, tl.full((), -1, tl.int64))
    tl.store(out_tokens_ptr + first + nodes, tokens, mask=chosen)
    tl.store(out_parents_ptr + first + nodes, above.to(tl.int64), mask=chosen)
    places = tl.arange(0, NODES)
    unused = (places >= limit) & (places < num_nodes)
    nothing = tl.full((NODES,), -1, tl.int64)
    tl.store(out_tokens_ptr + first + places, nothing, mask=unused)
    tl.store(out_parents_ptr + first + places, nothing, mask=unused)


@triton.jit
def _ancestors_kernel(
    parents_ptr,  # [B, N] int64, rows parents_stride apart
    masks_ptr,  # [B, N] int64 out
    depths_ptr,  # [B, N] int64 out
    parents_stride,
    N,
    NODES: tl.constexpr,  # a power of two, at least N
    TURNS: tl.constexpr,  # 2 ** TURNS is at least N
):
    """Masks and depths of one tree, grid (B,). Each turn doubles the reach of the masks."""

    await_inputs()
    row = tl.program_id(0).to(tl.int64)
    nodes = tl.arange(0, NODES)
    inside = nodes < N
    parents = tl.load(parents_ptr + row * parents_stride + nodes, mask=inside, other=-1)
    parents = parents.to(tl.int32)
    above = tl.where(parents < 0, nodes, parents)
    depths = (parents >= 0).to(tl.int32)
    masks = tl.full((NODES,), 1, tl.int64) << nodes.to(tl.int64)
    for _ in tl.static_range(TURNS):
        depths += tl.gather(depths, above, axis=0)
        masks |= tl.gather(masks, above, axis=0)
        above = tl.gather(above, above, axis=0)
    tl.store(masks_ptr + row * N + nodes, masks, mask=inside)
    tl.store(depths_ptr + row * N + nodes, depths.to(tl.int64), mask=inside)


@triton.jit
def child_of(node, token, tokens, parents, nodes, inside, NODES: tl.constexpr):
    """The first child of a node with this token, NODES if there is none."""
    is_next = inside & (parents == node) & (tokens == token)
    return tl.min(tl.where(is_next, nodes, NODES), axis=0)


@triton.jit
def _walk_kernel(
    tokens_ptr,  # [B, N] int64, rows tokens_stride apart
    parents_ptr,  # [B, N] int64, rows parents_stride apart
    drawn_ptr,  # [B, N] int64, rows drawn_stride apart
    path_ptr,  # [B, max_depth + 1] int64 out
    num_accepted_ptr,  # [B] int64 out
    emitted_ptr,  # [B, max_depth + 1] int64 out
    tokens_stride,
    parents_stride,
    drawn_stride,
    N,
    max_depth,
    NODES: tl.constexpr,  # a power of two, at least N
):
    """The walk down one tree, grid (B,)."""
    await_inputs()
    row = tl.program_id(0).to(tl.int64)
    nodes = tl.arange(0, NODES)
    inside = nodes < N
    tokens = tl.load(tokens_ptr + row * tokens_stride + nodes, mask=inside, other=-1)
    parents = tl.load(parents_ptr + row * parents_stride + nodes, mask=inside, other=-1)
    node = tl.program_id(0) * 0
    num_steps = node
    token = tl.load(drawn_ptr + row * drawn_stride)
    first = row * (max_depth + 1)
    tl.store(path_ptr + first, node.to(tl.int64))
    tl.store(emitted_ptr + first, token)
    for depth in range(1, max_depth + 1):
        found = child_of(node, token, tokens, parents, nodes, inside, NODES)
        alive = (found < NODES) & (num_steps == depth - 1)
        node = tl.where(alive, found, node)
        num_steps += alive.to(tl.int32)
        token = tl.load(drawn_ptr + row * drawn_stride + node)
        tl.store(path_ptr + first + depth, tl.where(alive, node, -1).to(tl.int64))
        tl.store(emitted_ptr + first + depth, tl.where(alive, token, -1))
    tl.store(num_accepted_ptr + row, num_steps.to(tl.int64))


def select(
    tokens: Tensor,
    parents: Tensor,
    scores: Tensor,
    root_tokens: Tensor,
    limits: Tensor,
    num_nodes: int,
) -> tuple[Tensor, Tensor]:
    """As the reference: candidates [B, C], limits [B] -> tokens and parents [B, num_nodes]."""
    out = [_integers(tokens, len(tokens), num_nodes) for _ in range(2)]
    _select_launch(tokens, parents, scores, root_tokens, limits, *out).run()
    return out[0], out[1]


def ancestors(parents: Tensor) -> tuple[Tensor, Tensor]:
    """As the reference: parents [B, N] -> masks and depths [B, N]."""
    masks, depths = (_integers(parents, *parents.shape) for _ in range(2))
    _ancestors_launch(parents, masks, depths).run()
    return masks, depths


def walk(
    tokens: Tensor, parents: Tensor, drawn: Tensor, max_depth: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference: trees and draws [B, N] -> path [B, max_depth + 1], number accepted [B],
    emitted tokens [B, max_depth + 1]."""
    path, emitted = (_integers(drawn, len(drawn), max_depth + 1) for _ in range(2))
    num_accepted = _integers(drawn, len(drawn))
    _walk_launch(tokens, parents, drawn, path, num_accepted, emitted).run()
    return path, num_accepted, emitted


def _integers(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int64, device=like.device)


def _select_launch(
    tokens: Tensor,
    parents: Tensor,
    scores: Tensor,
    root_tokens: Tensor,
    limits: Tensor,
    out_tokens: Tensor,
    out_parents: Tensor,
) -> Launch:
    B, C = tokens.shape
    num_nodes = out_tokens.shape[1]
    assert num_nodes <= min(C + 1, MAX_NODES)
    assert C <= MAX_CANDIDATES
    assert all(part.is_contiguous() for part in (tokens, parents, scores, root_tokens, limits))
    return Launch(
        name=f"tree.select[C={C}]",
        kernel=_select_kernel,
        grid=(B,),
        arguments={
            "tokens_ptr": tokens,
            "parents_ptr": parents,
            "scores_ptr": scores,
            "root_tokens_ptr": root_tokens,
            "limits_ptr": limits,
            "out_tokens_ptr": out_tokens,
            "out_parents_ptr": out_parents,
            "C": C,
            "num_nodes": num_nodes,
            "CANDIDATES": triton.next_power_of_2(C),
            "NODES": triton.next_power_of_2(num_nodes),
        },
        num_warps=8 if C > 2048 else 4,
    )


def _ancestors_launch(parents: Tensor, masks: Tensor, depths: Tensor) -> Launch:
    B, N = parents.shape
    assert N <= MAX_NODES
    assert parents.stride(1) == 1
    return Launch(
        name=f"tree.ancestors[N={N}]",
        kernel=_ancestors_kernel,
        grid=(B,),
        arguments={
            "parents_ptr": parents,
            "masks_ptr": masks,
            "depths_ptr": depths,
            "parents_stride": parents.stride(0),
            "N": N,
            "NODES": triton.next_power_of_2(N),
            "TURNS": (N - 1).bit_length(),
        },
        num_warps=1,
    )


def _walk_launch(
    tokens: Tensor,
    parents: Tensor,
    drawn: Tensor,
    path: Tensor,
    num_accepted: Tensor,
    emitted: Tensor,
) -> Launch:
    B, N = drawn.shape
    assert all(part.stride(1) == 1 for part in (tokens, parents, drawn))
    return Launch(
        name=f"tree.walk[N={N}]",
        kernel=_walk_kernel,
        grid=(B,),
        arguments={
            "tokens_ptr": tokens,
            "parents_ptr": parents,
            "drawn_ptr": drawn,
            "path_ptr": path,
            "num_accepted_ptr": num_accepted,
            "emitted_ptr": emitted,
            "tokens_stride": tokens.stride(0),
            "parents_stride": parents.stride(0),
            "drawn_stride": drawn.stride(0),
            "N": N,
            "max_depth": path.shape[1] - 1,
            "NODES": triton.next_power_of_2(N),
        },
        num_warps=1,
    )


def launches() -> list[Launch]:
    """Dynamic trees of EAGLE-2's size, and the largest choice of candidates."""
    B, C, N = 16, 510, MAX_NODES

    def new(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    nodes, row, found = new(B, N), new(B), []
    for candidates in (C, MAX_CANDIDATES):
        ids, floats = new(B, candidates), new(B, candidates, dtype=torch.float32)
        found.append(_select_launch(ids, ids, floats, row, row, nodes, nodes))
    return [
        *found,
        _ancestors_launch(nodes, nodes, nodes),
        _walk_launch(nodes, nodes, nodes, nodes, row, nodes),
    ]
