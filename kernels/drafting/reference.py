"""The steps between the forwards of a draft head in plain torch. Nothing waits for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.drafting.nodes import (
    Candidates,
    Frontier,
    LaidNodes,
    LevelNodes,
    ReadyRoots,
    RootStates,
    RowPlaces,
    evenly,
)


def ready_roots(roots: RootStates) -> ReadyRoots:
    """Which rows can draft, and what they begin with."""
    lines, max_nodes = roots.lines, roots.max_nodes
    states = roots.states[lines]
    wanted = (max_nodes > 1) & (roots.state_positions[lines] == roots.positions)
    sound = states.isfinite().all(dim=1)
    # A row that drafts also has slots for nodes that the shape drafts but does not keep.
    room = torch.where(max_nodes > 1, roots.num_drafted, max_nodes).maximum(max_nodes)
    ready = wanted & sound
    return ReadyRoots(
        states=states,
        ready=ready,
        faults=wanted & ~sound,
        num_slots=room,
        first_keys=first_keys(roots.firsts, lines, roots.positions, roots.window),
        sizes=torch.where(ready, max_nodes, max_nodes.clamp(max=1)),
    )


def first_keys(firsts: Tensor, lines: Tensor, prefix_lens: Tensor, window: int | None) -> Tensor:
    """The first entry that each row attends to, [B] int32; padding rows have no prefix.

    Args:
        firsts: [L] int32 by line.
        prefix_lens: [B] of any integer type.
        window: number of newest entries that are attended to; None: all.
    """
    first = firsts[lines]
    if window is not None:
        first = first.maximum(prefix_lens - window)
    return first.minimum(prefix_lens).int()


def keep_states(
    kept_states: Tensor,
    kept_positions: Tensor,
    lines: Tensor,
    states: Tensor,
    last: Tensor,
    newest: Tensor,
) -> None:
    """Store the state of the last entry of each row, and its position, by line, in place.

    Args:
        kept_states: [L, H].
        kept_positions: [L] int64.
        lines: [B] int64; if several rows have one line, any of them is stored.
        states: [C, H].
        last: [B] int64 index of each row's last entry.
        newest: [B] int64 its position.
    """
    kept_states.index_put_((lines,), states[last])
    kept_positions.index_put_((lines,), newest)


def lay_levels(nodes: LevelNodes, rows: RowPlaces) -> LaidNodes:
    """Positions, slots and masks of the nodes of all levels."""
    (M,), (B,) = nodes.nodes.shape, rows.positions.shape
    alive = nodes.nodes < rows.num_slots[:, None]  # [B, M]
    slots = cache_slots(rows.tables, rows.positions[:, None] + nodes.nodes, rows.block_size)
    scratch = rows.first_scratch + nodes.nodes % rows.block_size
    positions = (rows.positions[:, None] + nodes.depths).clamp(max=rows.max_len - 1)
    row = torch.arange(B, device=slots.device)[:, None]
    place = torch.arange(M, device=slots.device) - nodes.firsts
    at = (nodes.firsts * evenly(B) + row * nodes.widths + place).flatten()

    def laid(values: Tensor) -> Tensor:
        out = values.new_zeros(M * evenly(B))
        return out.index_put_((at,), values.flatten())

    return LaidNodes(
        prefix_lens=rows.positions.int(),
        positions=laid(positions),
        slots=laid(torch.where(alive, slots, scratch)),
        masks=laid(seen_of(nodes.masks, alive)),
    )


def grow_level(
    tokens: Tensor,
    local: Tensor,
    frontier: Frontier | None,
    bits: Tensor | None,
    candidates: Candidates,
    first: int,
) -> Frontier | None:
    """Make candidates of the children of all frontier nodes, from column `first` on, and choose the
    next frontier of k nodes among them: the likeliest, and the lower index among equals.

    Args:
        tokens: [B, K, k] int64 the best tokens after each frontier node.
        local: [B, K, k] float32 their log-probabilities; NaN counts as -inf, above 0 as 0: a child
            never scores above its parent.
        frontier: of K nodes; None: the root.
        bits: [B * k] int64 the own bit of each node of the next frontier, or 1 if it has no slot;
            None: there is no next frontier.
    """
    K, k = tokens.shape[1:]
    scores = torch.where(local.isnan(), -torch.inf, local).clamp(max=0.0)
    masks, places = torch.ones_like(tokens[:, :, 0]), torch.full_like(tokens[:, :, 0], -1)
    if frontier is not None:
        scores = frontier.scores[:, :, None] + scores
        masks, places = frontier.masks, frontier.places
    some = slice(first, first + K * k)
    candidates.tokens[:, some] = tokens.flatten(1)
    candidates.parents[:, some] = places.repeat_interleave(k, dim=1)
    candidates.scores[:, some] = scores.flatten(1)
    return None if bits is None else _best_children(tokens, scores, masks, bits, first)


def _best_children(
    tokens: Tensor, scores: Tensor, masks: Tensor, bits: Tensor, first: int
) -> Frontier:
    """Of children [B, K, k] of nodes with these masks [B, K]."""
    B, K, k = tokens.shape
    ordered = scores.flatten(1).sort(dim=1, descending=True, stable=True)
    best = ordered.indices[:, :k]
    row = torch.arange(B, device=best.device)[:, None]
    return Frontier(
        tokens=tokens.flatten(1).gather(1, best),
        scores=ordered.values[:, :k].contiguous(),
        masks=masks.gather(1, best // k) | bits.view(B, k),
        places=best + first,
        feature_of=(row * K + best // k).flatten(),
    )


def cache_slots(tables: Tensor, positions: Tensor, block_size: int) -> Tensor:
    """Slots [B, n] int64 of cache positions [B, n], by block tables [B, columns]; an arbitrary
    slot for positions beyond the end of a table."""
    columns = (positions // block_size).clamp(max=tables.shape[1] - 1)
    return tables.gather(1, columns).long() * block_size + positions % block_size


def seen_of(masks: Tensor, alive: Tensor) -> Tensor:
    """Ancestor masks [B, n] in which nodes that are not `alive` see only the root. Their keys and
    values went to the scratch block, so their own slots may hold NaN; zero times NaN is NaN, and
    it would spread to all queries that a kernel computes together."""
    return torch.where(alive, masks, 1)
