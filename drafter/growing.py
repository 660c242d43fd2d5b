"""Grow draft trees level by level with batched draft forwards."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from drafter.heads.interface import DraftBatch, DraftContext, DraftHead
from drafter.ranking import Noise, best_children
from engine.spec.proposer import Roots
from engine.spec.shape import DynamicShape, StaticShape, signed
from engine.spec.tree import DraftTree
from kernels.ops import AttentionMeta


@dataclass(frozen=True, slots=True)
class Grower:
    """Rows that draft together. Node i of a row lives in the slot i behind its root's."""

    head: DraftHead
    ctx: DraftContext
    roots: Roots
    first_keys: Tensor  # [B] int32, cache position of the first entry that is looked at

    @property
    def num_rows(self) -> int:
        return len(self.roots.tokens)

    def children(self, states: Tensor, depth: int, count: int) -> tuple[Tensor, Tensor]:
        """The best tokens behind nodes of one depth, and their scores.

        Args:
            states: [B, n, H].

        Returns:
            two [B, n, count] tensors.
        """
        per_row = states.shape[1]
        noise = Noise(
            self.roots.temperatures.repeat_interleave(per_row),
            self.roots.seeds.repeat_interleave(per_row),
            (self.roots.positions + depth + 1).repeat_interleave(per_row),
        )
        logits = self.head.logits(states.flatten(0, 1), self.ctx)
        tokens, scores = best_children(logits, count, noise, self.head.target_ids)
        shape = (self.num_rows, per_row, tokens.shape[1])
        return tokens.view(shape), scores.view(shape)

    def forward(
        self, tokens: Tensor, features: Tensor, nodes: Tensor, masks: Tensor, depth: int
    ) -> Tensor:
        """Run nodes of one depth through the head.

        Args:
            tokens: [B, n].
            features: [B, n, H] states of their parents.
            nodes: [B, n] their numbers.
            masks: [B, n] int64 ancestor masks over node numbers, own bit included.

        Returns:
            [B, n, H] states.
        """
        num_rows, per_row = tokens.shape
        roots, page = self.roots, self.ctx.kv.keys[0]
        at = roots.positions[:, None] + nodes  # cache positions
        block_size = page.shape[1]
        blocks = roots.block_tables.gather(1, at // block_size).long()
        batch = DraftBatch(
            token_ids=tokens.flatten(),
            positions=(roots.positions + depth).repeat_interleave(per_row),
            slots=(blocks * block_size + at % block_size).flatten(),
            attention=AttentionMeta(
                cu_q=torch.arange(num_rows + 1, dtype=torch.int32, device=tokens.device) * per_row,
                prefix_lens=roots.positions.int(),
                first_keys=self.first_keys,
                block_tables=roots.block_tables,
                ancestors=masks.flatten(),
                max_q=per_row,
                max_context=int(at.max()) + 1,
            ),
        )
        states = self.head.forward(features.flatten(0, 1), batch, self.ctx)
        return states.view(num_rows, per_row, -1)


def grow_static(grower: Grower, shape: StaticShape, root_states: Tensor) -> DraftTree:
    """Fill a fixed shape: the children of a node are its best candidates in order.

    Args:
        root_states: [B, H].
    """
    device = root_states.device
    tokens = grower.roots.tokens[:, None].repeat(1, shape.num_nodes)  # [B, N]
    states = root_states[:, None].repeat(1, shape.num_nodes, 1)  # [B, N, H]
    plan = _levels(shape)
    masks = torch.tensor([signed(mask) for mask in shape.ancestors], device=device)
    for depth in range(shape.max_depth):
        parents = torch.tensor(plan.with_children[depth], device=device)
        if depth:
            level = parents.expand(grower.num_rows, -1)
            above = torch.tensor([shape.parents[node] for node in plan.with_children[depth]])
            states[:, parents] = grower.forward(
                tokens[:, parents], states[:, above], level, masks[level], depth
            )
        best, _ = grower.children(states[:, parents], depth, plan.most_children[depth])
        for place, children in enumerate(plan.children_of[depth]):
            filled = min(len(children), best.shape[2])
            tokens[:, children[:filled]] = best[:, place, :filled]
    return DraftTree.of_shape(shape, tokens, torch.full_like(tokens[:, 0], shape.num_nodes))


class _Levels:
    """A static shape, level by level: only nodes with children go through the head."""

    def __init__(self, shape: StaticShape) -> None:
        children: list[list[int]] = [[] for _ in shape.parents]
        for node, parent in enumerate(shape.parents):
            if parent >= 0:
                children[parent].append(node)
        depths = range(shape.max_depth)
        self.with_children = [
            [n for n, d in enumerate(shape.depths) if d == depth and children[n]]
            for depth in depths
        ]
        self.children_of = [[children[n] for n in level] for level in self.with_children]
        self.most_children = [max(map(len, level)) for level in self.children_of]


@functools.cache
def _levels(shape: StaticShape) -> _Levels:
    return _Levels(shape)


def grow_dynamic(grower: Grower, shape: DynamicShape, root_states: Tensor) -> DraftTree:
    """EAGLE-2: widen the likeliest frontier, then keep the likeliest nodes of all.

    While drafting, frontier node j of level d has the number 1 + (d - 1) * top_k + j.
    """
    k = shape.top_k
    drafted = _Drafted.start(grower, root_states, k)
    for depth in range(1, shape.max_depth):
        numbers = torch.arange(k, device=root_states.device) + 1 + (depth - 1) * k
        drafted.widen(grower, depth, numbers.expand(grower.num_rows, k), k)
    return drafted.best(grower.roots, shape.num_nodes)


@dataclass(slots=True)
class _Drafted:
    """All candidates so far, C per row, parents before children; and the frontier among them."""

    tokens: Tensor  # [B, C] int64
    parents: Tensor  # [B, C] int64 index of the parent candidate, -1 for the root
    depths: Tensor  # [B, C] int64
    scores: Tensor  # [B, C] float32 cumulative
    frontier: Tensor  # [B, k] indices of candidates
    features: Tensor  # [B, k, H] states of the frontier's parents
    masks: Tensor  # [B, k] ancestor masks of the frontier's parents over node numbers

    @classmethod
    def start(cls, grower: Grower, root_states: Tensor, k: int) -> _Drafted:
        tokens, scores = (x[:, 0] for x in grower.children(root_states[:, None], 0, k))  # [B, k]
        return cls(
            tokens=tokens,
            parents=torch.full_like(tokens, -1),
            depths=torch.ones_like(tokens),
            scores=scores.nan_to_num(nan=-torch.inf).clamp(max=0.0),
            frontier=torch.arange(k, device=tokens.device).expand_as(tokens),
            features=root_states[:, None].expand(-1, k, -1),
            masks=torch.ones_like(tokens),  # the root
        )

    def widen(self, grower: Grower, depth: int, numbers: Tensor, k: int) -> None:
        """Run the frontier through the head, add its children, choose the next frontier."""
        masks = self.masks | (1 << numbers)
        tokens = self.tokens.gather(1, self.frontier)
        states = grower.forward(tokens, self.features, numbers, masks, depth)  # [B, k, H]
        found, local = grower.children(states, depth, k)  # [B, k, k]
        # A head gone wrong must not make a tree with children before their parents.
        local = local.nan_to_num(nan=-torch.inf).clamp(max=0.0)
        scores = (self.scores.gather(1, self.frontier)[:, :, None] + local).flatten(1)  # [B, k * k]
        first = self.tokens.shape[1]
        parents = self.frontier.repeat_interleave(k, dim=1)
        self.tokens = torch.cat((self.tokens, found.flatten(1)), dim=1)
        self.parents = torch.cat((self.parents, parents), dim=1)
        self.depths = torch.cat((self.depths, torch.full_like(parents, depth + 1)), dim=1)
        self.scores = torch.cat((self.scores, scores), dim=1)
        best = scores.topk(k, dim=1).indices  # [B, k] among the new ones
        owner = best // k  # which frontier node each belongs to
        self.frontier = best + first
        self.features = states.gather(1, owner[:, :, None].expand(-1, -1, states.shape[2]))
        self.masks = masks.gather(1, owner)

    def best(self, roots: Roots, num_nodes: int) -> DraftTree:
        """The likeliest `num_nodes - 1` candidates below the root. A child never scores above its
        parent and comes after it, so a stable choice keeps whole paths."""
        count = min(num_nodes - 1, self.tokens.shape[1])
        order = self.scores.argsort(dim=1, descending=True, stable=True)[:, :count]
        chosen = order.sort(dim=1).values  # [B, count] parents first
        number = torch.zeros_like(self.tokens)  # of each candidate in the tree
        number.scatter_(
            1, chosen, torch.arange(1, count + 1, device=chosen.device).expand_as(chosen)
        )
        parents = self.parents.gather(1, chosen)
        parents = torch.where(parents < 0, 0, number.gather(1, parents.clamp(min=0)))
        root = torch.zeros_like(parents[:, :1])
        parents = torch.cat((root - 1, parents), dim=1)
        tree = DraftTree(
            tokens=torch.cat((roots.tokens[:, None], self.tokens.gather(1, chosen)), dim=1),
            parents=parents,
            depths=torch.cat((root, self.depths.gather(1, chosen)), dim=1),
            ancestors=_ancestors(parents),
            sizes=torch.full_like(roots.tokens, count + 1),
            max_depth=0,
        )
        return tree.cut(tree.sizes)


def _ancestors(parents: Tensor) -> Tensor:
    """[B, N] masks of trees whose parents come before their children."""
    masks = torch.ones_like(parents)
    for node in range(1, parents.shape[1]):
        above = masks.gather(1, parents[:, node : node + 1])[:, 0]
        masks[:, node] = above | (1 << node)
    return masks
