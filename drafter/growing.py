"""Grow draft trees level by level with batched draft forwards. No function here waits for the
device: tensor shapes depend only on the tree's shape and on numbers that the host knows."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from drafter.heads.interface import DraftBatch, DraftBlock, DraftContext, DraftHead, ParallelHead
from drafter.static_levels import StaticLevels
from engine.kv.scratch import Scratch
from engine.speculation.proposer import DraftLimits, Roots
from engine.step.batch import logit_slices
from engine.step.shape import DynamicShape, StaticShape, TreeShape
from engine.step.tree import DraftTree
from kernels.drafting.nodes import Candidates, LaidNodes, LevelNodes, RowPlaces
from kernels.drafting.reference import cache_slots, seen_of
from kernels.ops import AttentionMeta
from kernels.sampling.rank.ranking import NodeDraws, Ranked
from kernels.sampling.settings import DrawSettings


@dataclass(frozen=True, slots=True)
class Grower:
    """Rows that draft together. Node i of a row lives in the slot i places after its root's."""

    head: DraftHead
    ctx: DraftContext
    roots: Roots
    num_slots: Tensor  # [B] int64 slots of a row for drafted nodes, the root's included
    first_keys: Tensor  # [B] int32, cache position of the first entry that is attended to
    sizes: Tensor  # [B] int64 nodes that a row's tree keeps, root included
    limits: DraftLimits
    scratch: Scratch  # slots for nodes that have none of their own
    levels: StaticLevels

    def children(self, states: Tensor, depth: int, count: int, *, scored: bool) -> Ranked:
        """The best tokens after nodes of one depth.

        Args:
            states: [B, n, H].
            scored: whether scores are wanted.

        Returns:
            Tokens and scores [B, n, count]; fewer if there are no more.
        """
        return self.ranked(states, self._draws(states.shape[1], depth + 1, 0), count, scored)

    def ranked(self, states: Tensor, draws: NodeDraws, count: int, scored: bool) -> Ranked:
        """The same for nodes of any depth."""
        nodes, ids = states.flatten(0, 1).contiguous(), self.head.target_ids
        found = []
        for some in logit_slices(len(nodes)):
            logits = self.head.logits(nodes[some], self.ctx)
            part = replace(draws, begin=some.start)
            found.append(self.ctx.ops.rank_drafts(logits, part, ids, count, scored))
        shape = (*states.shape[:2], -1)
        scores = [part.scores for part in found if part.scores is not None]
        tokens = _joined([part.tokens for part in found]).view(shape)
        return Ranked(tokens, _joined(scores).view(shape) if scores else None)

    def one_after_another(self, num_nodes: int) -> NodeDraws:
        """How the tokens at the depths 1 to `num_nodes` are drawn."""
        return self._draws(num_nodes, 1, 1)

    def _draws(self, per_row: int, ahead: int, step: int) -> NodeDraws:
        roots, is_filtered = self.roots, self.limits.is_filtered
        rows = DrawSettings(
            temperature=roots.temperatures,
            seeds=roots.seeds,
            positions=roots.positions,
            top_k=roots.top_k if is_filtered else None,
            top_p=roots.top_p if is_filtered else None,
            min_p=roots.min_p if is_filtered else None,
            any_sampled=self.limits.any_sampled,
        )
        return NodeDraws(rows, per_row, ahead, step)

    def lay(self, nodes: LevelNodes) -> LaidNodes:
        """Where all nodes that go through the head lie, and what they see."""
        roots, scratch = self.roots, self.scratch
        places = RowPlaces(
            positions=roots.positions,
            num_slots=self.num_slots,
            tables=roots.block_tables,
            block_size=scratch.block_size,
            first_scratch=scratch.first_slot,
            max_len=self.limits.max_len,
        )
        return self.ctx.ops.lay_levels(nodes, places)

    def forward(
        self,
        tokens: Tensor,
        features: Tensor,
        level: LaidNodes,
        feature_of: Tensor | None = None,
    ) -> Tensor:
        """Run nodes of one depth through the head.

        Args:
            tokens: [B, n].
            features: [B, n, H] states of their parents.
            level: these nodes.
            feature_of: [B * n], which of all features, [B, m, H], each node takes.

        Returns:
            [B, n, H] states.
        """
        batch = self._batch(tokens, level, self.limits.max_context)
        batch = batch if feature_of is None else replace(batch, feature_of=feature_of)
        states = self.head.forward(features.flatten(0, 1).contiguous(), batch, self.ctx)
        return states.view(*tokens.shape, -1)

    def _batch(self, tokens: Tensor, laid: LaidNodes, max_context: int) -> DraftBatch:
        """Entries of tokens [B, n]."""
        num_rows, per_row = tokens.shape
        return DraftBatch(
            token_ids=tokens.flatten().contiguous(),
            positions=laid.positions,
            slots=laid.slots,
            attention=AttentionMeta(
                cu_q=self.levels.starts(num_rows, per_row),
                prefix_lens=laid.prefix_lens,
                first_keys=self.first_keys,
                block_tables=self.roots.block_tables,
                ancestors=laid.masks,
                max_q=per_row,
                max_context=max_context,
            ),
        )

    def all_at_once(self, head: ParallelHead, root_states: Tensor, depth: int) -> Tensor:
        """States [B, depth, H] for the tokens after the roots, from one forward of a head that
        drafts in parallel."""
        block = head.block(self.roots.tokens, depth)
        batch = None if block is None else self._block_batch(block)
        return head.draft(root_states, batch, depth, self.ctx)

    def _block_batch(self, block: DraftBlock) -> DraftBatch:
        """Entry j is node j + 1. The last one may lie in the slot that a proposer has after those
        of the nodes."""
        first = self.roots.positions[:, None]
        places = torch.arange(block.token_ids.shape[1], device=first.device)
        nodes = (places + 1).expand_as(block.token_ids)
        alive = (nodes <= self.num_slots[:, None]) & (first + nodes < self.limits.max_len)
        last = nodes if block.causal else nodes[:, -1:]
        last = last.minimum(alive.sum(dim=1, keepdim=True))  # of the nodes that an entry sees
        masks = torch.full_like(nodes, -1) ^ (torch.full_like(nodes, -2) << last)
        positions = (first + block.first_position + places).clamp(max=self.limits.max_len - 1)
        slots = cache_slots(self.roots.block_tables, first + nodes, self.scratch.block_size)
        laid = LaidNodes(
            prefix_lens=self.roots.positions.int(),
            positions=positions.flatten(),
            slots=self.scratch.instead_of(slots, alive, nodes).flatten(),
            masks=seen_of(masks, alive).flatten(),
        )
        reach = self.limits.max_context + int(self.limits.exact)  # the slot after the nodes
        return self._batch(block.token_ids, laid, reach)

    def selected(self, shape: DynamicShape, candidates: Candidates) -> DraftTree:
        """The best candidates of each row, as its tree."""
        ops, found = self.ctx.ops, candidates
        num_nodes = min(shape.num_nodes, found.tokens.shape[1] + 1)
        tokens, parents = ops.tree_select(
            found.tokens, found.parents, found.scores, self.roots.tokens, self.sizes, num_nodes
        )
        masks, depths = ops.tree_ancestors(parents)
        return DraftTree(
            tokens=tokens.clamp(min=0),
            parents=parents,
            depths=depths,
            ancestors=masks,
            # Rows have room for the shape's nodes, of which there may be fewer candidates.
            sizes=self.sizes if num_nodes == shape.num_nodes else self.sizes.clamp(max=num_nodes),
            max_depth=min(shape.max_depth, num_nodes - 1),
        )


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts))


@functools.singledispatch
def grow(shape: TreeShape, grower: Grower, root_states: Tensor) -> DraftTree:  # noqa: ARG001
    """Trees of one shape for all rows, from the states [B, H] of their roots. Nodes are ordered so
    that the first `max_nodes` of a row are a tree, too."""
    raise TypeError(f"no way to grow a {type(shape).__name__}")


@grow.register
def grow_static(shape: StaticShape, grower: Grower, root_states: Tensor) -> DraftTree:
    """Fill a fixed shape: the children of a node are its best candidates in order.

    Args:
        root_states: [B, H].
    """
    plan, roots = grower.levels.of(shape), grower.roots.tokens[:, None]
    states = root_states[:, None]  # [B, 1, H]
    laid = grower.lay(plan.inner) if len(plan.inner.nodes) else None
    candidates, widths = [roots], list[int]()
    for depth, level in enumerate(plan.levels):
        if depth:
            assert laid is not None
            tokens = candidates[-1][:, grower.levels.inner(shape, depth, widths[-1])]
            nodes = laid.level(level.first, level.width)
            states = grower.forward(tokens, states[:, level.above], nodes)
        best = grower.children(states, depth, level.most_children, scored=False).tokens
        widths.append(best.shape[2])
        candidates.append(best.flatten(1))
    order = grower.levels.order(shape, tuple(widths))
    return plan.tree(torch.cat(candidates, dim=1)[:, order], grower.sizes)


@grow.register
def grow_dynamic(shape: DynamicShape, grower: Grower, root_states: Tensor) -> DraftTree:
    """EAGLE-2: expand the likeliest frontier, then keep the likeliest of all nodes.

    While drafting, frontier node j of level d has the number 1 + (d - 1) * top_k + j.
    """
    k, ops, levels = shape.top_k, grower.ctx.ops, range(shape.max_depth)
    laid = grower.lay(grower.levels.frontiers(shape)) if shape.max_depth > 1 else None
    candidates = _candidates(grower.roots.tokens, k + (shape.max_depth - 1) * k * k)
    states, frontier, first = root_states[:, None], None, 0
    for depth in levels:
        if frontier is not None:
            assert laid is not None
            level = replace(laid.level((depth - 1) * k, k), masks=frontier.masks.flatten())
            states = grower.forward(frontier.tokens, states, level, frontier.feature_of)
        best = grower.children(states, depth, k, scored=True)  # [B, 1 or k, k]
        assert best.scores is not None
        bits = None if laid is None or depth == levels[-1] else laid.level(depth * k, k).masks
        frontier = ops.grow_level(best.tokens, best.scores, frontier, bits, candidates, first)
        first += best.tokens[0].numel()
    return grower.selected(shape, candidates)


def _candidates(like: Tensor, count: int) -> Candidates:
    """Room for `count` candidates of each row of `like` [B]."""
    tokens, parents = (like.new_empty(len(like), count) for _ in range(2))
    scores = torch.empty(tokens.shape, dtype=torch.float32, device=like.device)
    return Candidates(tokens, parents, scores)
