"""A level of a dynamic draft tree in one launch: candidates, and the next frontier."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.drafting.nodes import Candidates, Frontier
from kernels.sampling.triton_functions import NO_KEY, packed_id, packed_key, packed_value
from kernels.triton_launch import Launch, pointers
from kernels.triton_overlap import await_inputs

MAX_CHILDREN = 4096


@triton.jit
def _grow_level_kernel(
    tokens_ptr,  # [B, K, k] int64 contiguous
    local_ptr,  # [B, K, k] float32 contiguous
    above_scores_ptr,  # [B, K], as `Frontier` says; None: the root, as for the next two
    above_masks_ptr,
    above_places_ptr,
    bits_ptr,  # [B, k] int64; None: there is no next frontier, and so for what begins with next_
    candidates_tokens_ptr,  # [B, C], as `Candidates` says
    candidates_parents_ptr,
    candidates_scores_ptr,
    next_tokens_ptr,  # [B, k], as `Frontier` says
    next_scores_ptr,
    next_masks_ptr,
    next_places_ptr,
    next_feature_of_ptr,
    C,
    first,
    K,
    COUNT: tl.constexpr,  # k
    CHILDREN: tl.constexpr,  # a power of two, at least K * k
    FRONTIER: tl.constexpr,  # a power of two, at least k
):
    """One row, grid (B,)."""
    await_inputs()
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, CHILDREN)
    num_children = K * COUNT
    inside = lanes < num_children
    tokens_row = tokens_ptr + row * num_children
    tokens = tl.load(tokens_row + lanes, mask=inside, other=0)
    scores = tl.load(local_ptr + row * num_children + lanes, mask=inside, other=0.0)
    scores = tl.where(scores == scores, tl.minimum(scores, 0.0), float("-inf"))
    parents = tl.full((CHILDREN,), -1, tl.int64)
    if above_scores_ptr is not None:
        above = row * K + lanes // COUNT
        scores += tl.load(above_scores_ptr + above, mask=inside, other=0.0)
        parents = tl.load(above_places_ptr + above, mask=inside, other=0)
    out = row * C + first + lanes
    tl.store(candidates_tokens_ptr + out, tokens, mask=inside)
    tl.store(candidates_parents_ptr + out, parents, mask=inside)
    tl.store(candidates_scores_ptr + out, scores, mask=inside)
    if bits_ptr is not None:
        keys = tl.where(inside, packed_key(scores, lanes), NO_KEY)
        places = tl.arange(0, FRONTIER)
        chosen = tl.full((FRONTIER,), NO_KEY, tl.int64)
        for place in range(COUNT):
            best = tl.max(keys, axis=0)
            keys = tl.where(keys == best, NO_KEY, keys)
            chosen = tl.where(places == place, best, chosen)
        stored = places < COUNT
        child = tl.where(stored, packed_id(chosen), 0)
        parent = row * K + child // COUNT
        masks = tl.load(bits_ptr + row * COUNT + places, mask=stored, other=0)
        if above_masks_ptr is not None:
            masks |= tl.load(above_masks_ptr + parent, mask=stored, other=0)
        else:
            masks |= 1
        at = row * COUNT + places
        token = tl.load(tokens_row + child, mask=stored, other=0)
        tl.store(next_tokens_ptr + at, token, mask=stored)
        tl.store(next_scores_ptr + at, packed_value(chosen), mask=stored)
        tl.store(next_masks_ptr + at, masks, mask=stored)
        tl.store(next_places_ptr + at, (first + child).to(tl.int64), mask=stored)
        tl.store(next_feature_of_ptr + at, parent, mask=stored)


def grow_level(
    tokens: Tensor,
    local: Tensor,
    frontier: Frontier | None,
    bits: Tensor | None,
    candidates: Candidates,
    first: int,
) -> Frontier | None:
    """As the reference."""
    (B, _, k), device = tokens.shape, tokens.device
    grown = None
    if bits is not None:

        def new(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        scores = new(B, k, dtype=torch.float32)
        grown = Frontier(new(B, k), scores, new(B, k), new(B, k), new(B * k))
    launch(tokens, local, frontier, bits, candidates, first, grown).run()
    return grown


def example_launches() -> list[Launch]:
    """A dynamic tree of EAGLE-2's size, and the widest level."""

    def new(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    found: list[Launch] = []
    for K, k, depth in ((1, 6, 0), (6, 6, 1), (6, 6, 3), (40, 40, 1)):
        B, C = 64, k + 3 * k * k
        scores, integers = new(B, k, dtype=torch.float32), new(B, k)
        kept = Frontier(integers, scores, integers, integers, new(B * k))
        candidates = Candidates(new(B, C), new(B, C), new(B, C, dtype=torch.float32))
        local, last = new(B, K, k, dtype=torch.float32), depth == 3
        frontier, grown = kept if depth else None, None if last else kept
        bits = None if last else new(B * k)
        first = 0 if depth == 0 else k
        found.append(launch(new(B, K, k), local, frontier, bits, candidates, first, grown))
    return found


def launch(
    tokens: Tensor,
    local: Tensor,
    frontier: Frontier | None,
    bits: Tensor | None,
    candidates: Candidates,
    first: int,
    grown: Frontier | None,
) -> Launch:
    B, K, k = tokens.shape
    assert K * k <= MAX_CHILDREN
    assert all(part is None or part.is_contiguous() for part in (tokens, local, bits))
    return Launch(
        name=f"grow_level[children={K * k}{_kind(frontier, bits)}]",
        kernel=_grow_level_kernel,
        grid=(B,),
        arguments={
            "tokens_ptr": tokens,
            "local_ptr": local,
            **_of_frontier("above_", frontier, ("scores", "masks", "places")),
            "bits_ptr": bits,
            **pointers("candidates_", candidates),
            **_of_frontier("next_", grown, _FIELDS),
            "C": candidates.tokens.shape[1],
            "first": first,
            "K": K,
            "COUNT": k,
            "CHILDREN": triton.next_power_of_2(K * k),
            "FRONTIER": triton.next_power_of_2(k),
        },
        num_warps=1 if K * k <= 128 else 4,
    )


def _kind(frontier: Frontier | None, bits: Tensor | None) -> str:
    return (", root" if frontier is None else "") + (", last" if bits is None else "")


_FIELDS = ("tokens", "scores", "masks", "places", "feature_of")


def _of_frontier(
    prefix: str, frontier: Frontier | None, names: tuple[str, ...]
) -> dict[str, Tensor | None]:
    """Tensors of a frontier as arguments of the kernel."""
    return {f"{prefix}{name}_ptr": getattr(frontier, name, None) for name in names}
