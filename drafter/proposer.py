"""The proposer around a draft head: keeps its cache in step with the target, and grows trees."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from drafter.growing import Grower, grow
from drafter.heads.interface import DraftBatch, DraftContext, DraftHead
from drafter.pending import Features, Pending
from drafter.static_levels import StaticLevels
from drafter.taps import FeatureCollector
from engine.kv.slots import Scratch
from engine.speculation.proposer import Committed, Drafted, DraftLimits, Roots
from engine.step.shape import TreeShape
from engine.step.tree import DraftTree
from kernels.ops import AttentionMeta

FIRST_ENTRY = 1  # position 0 has no entry: no token is before it, so there is no feature
MAX_PENDING = 64  # tokens; with more, linear layers do not get cheaper per token

logger = logging.getLogger(__name__)


class DraftProposer:
    """Implements `Proposer`.

    The entry of token i is computed from that token and the target's feature of token i - 1. It
    lies in slot i of the head's own pages, under the target's block tables, so prefix hits,
    preemption and release need no extra work. After each step the newest token of a row (its next
    root) already has its entry, and its state is kept per line until `draft` grows a tree from it.

    If the host may read values and no tree is wanted, steps only collect features. The head
    processes them together: once there are `max_pending` tokens, before its next tree, and before
    rows come or go. So every block of the prefix cache has its entries, and no entry is written to
    a block that has passed to another row.
    """

    lookahead = 1

    def __init__(
        self,
        head: DraftHead,
        ctx: DraftContext,
        num_lines: int,
        hidden_size: int,
        window: int | None = None,
        shared_noise: bool = True,
        max_pending: int = MAX_PENDING,
    ) -> None:
        """`window`: number of newest entries that the head attends to; None: all. Without
        `shared_noise` drafts are ranked by likelihood alone, as if all requests were greedy.
        `max_pending`: 1 processes tokens at once."""
        self.tap = FeatureCollector(head.tap_layers)
        self.failed = False
        self._head = head
        self._ctx = ctx
        self._window = window
        self._shared_noise = shared_noise
        self._scratch = Scratch(ctx.kv.num_blocks - 1, ctx.kv.block_size)
        device = ctx.kv.device
        self._levels = StaticLevels(device)
        # By line; padding rows use the last line.
        self._states = torch.zeros(
            num_lines + 1, hidden_size, dtype=ctx.ops.activation_dtype, device=device
        )
        self._positions = torch.full((num_lines + 1,), -1, dtype=torch.int64, device=device)
        self._max_pending = max_pending
        self._pending = Pending()
        self._drafted = False  # whether this step grew trees

    def admit(self, lines: Sequence[int]) -> None:
        if lines:
            at = torch.tensor(lines).to(self._positions.device)
            self._positions.index_fill_(0, at, -1)

    def settle(self) -> None:
        if self.failed:
            return
        try:
            self._settle()
        except Exception:  # noqa: BLE001  (a head may fail in any way; the text must not)
            self._give_up()

    def draft(self, roots: Roots, shape: TreeShape, limits: DraftLimits) -> Drafted:
        if not self.failed:
            try:
                return self._draft(roots, shape, limits)
            except Exception:  # noqa: BLE001  (a head may fail in any way; the text must not)
                self._give_up()
        nothing = torch.zeros_like(roots.tokens, dtype=torch.bool)
        return Drafted(DraftTree.roots(roots.tokens), nothing)

    def take(self, committed: Committed, hidden: Tensor) -> None:  # noqa: ARG002  (the tap saw it)
        if self.failed:
            return
        try:
            self._take(committed)
        except Exception:  # noqa: BLE001  (a head may fail in any way; the text must not)
            self._give_up()

    def _give_up(self) -> None:
        """Stop drafting: the head's cache can no longer be trusted. With several ranks the
        exception is raised again, since others may wait for this rank's part."""
        if self._ctx.group.size > 1:
            raise
        self.failed = True
        self._pending = Pending()
        logger.exception("the draft head failed; decoding continues without it")

    def _draft(self, roots: Roots, shape: TreeShape, limits: DraftLimits) -> Drafted:
        """Rows draft if the state of their root is known and finite; others keep their root."""
        self._drafted = True
        self._settle()
        wanted = (roots.max_nodes > 1) & (self._positions[roots.lines] == roots.positions)
        sound = self._states[roots.lines].isfinite().all(dim=1)
        ready = wanted & sound
        if not limits.exact:
            return Drafted(self._grow(roots, ready, shape, limits), wanted & ~sound)
        # All ranks must run the head on the same rows.
        ready = self._ctx.group.from_first(ready.long()).bool()
        tree = DraftTree.roots(roots.tokens)
        if bool(ready.any()):
            rows = ready.nonzero()[:, 0]
            grown = self._grow(roots.rows(rows), ready[rows], shape, limits)
            tree = _in_rows(grown, rows, tree)
        return Drafted(tree, wanted & ~sound)

    def _grow(
        self, roots: Roots, ready: Tensor, shape: TreeShape, limits: DraftLimits
    ) -> DraftTree:
        """Trees of `shape`, cut to the nodes that each row has room for."""
        states = self._states[roots.lines]
        # A row that drafts also has slots for nodes that the shape drafts but does not keep.
        room = torch.where(roots.max_nodes > 1, shape.slots_for(1), roots.max_nodes)
        grower = Grower(
            head=self._head,
            ctx=self._ctx,
            roots=roots if self._shared_noise else _all_greedy(roots),
            num_slots=room.maximum(roots.max_nodes),
            first_keys=self._first_keys(roots.positions),
            limits=limits if self._shared_noise else replace(limits, any_sampled=False),
            scratch=self._scratch,
            levels=self._levels,
        )
        tree = grow(shape, grower, states)
        return tree.cut(torch.where(ready, roots.max_nodes, roots.max_nodes.clamp(max=1)))

    def _take(self, committed: Committed) -> None:
        features = self.tap.take(committed.features)
        if not committed.exact:
            self._take_in(committed, features)
            return
        if not self._pending.followed_by(committed):  # a step that is repeated to measure it
            self._settle()
        self._pending.add(committed, features)
        drafted, self._drafted = self._drafted, False
        if drafted or self._pending.num_tokens >= self._max_pending:
            self._settle()

    def _settle(self) -> None:
        """Run the pending tokens through the head."""
        if self._pending.num_tokens == 0:
            return
        committed, by_layer = self._pending.merge()
        self._pending = Pending()
        self._take_in(committed, tuple(seen[committed.features] for seen in by_layer))

    def _take_in(self, committed: Committed, features: Features) -> None:
        """Run entries through the head, and keep the state of each row's last entry by line."""
        counts = committed.cu.diff()
        last = (committed.cu[1:] - 1).clamp(min=0)
        newest = committed.positions[last]
        prefix_lens = torch.where(counts > 0, newest + 1 - counts, 0)
        batch = DraftBatch(
            token_ids=committed.tokens,
            positions=committed.positions,
            slots=committed.slots,
            attention=AttentionMeta(
                cu_q=committed.cu.int(),
                prefix_lens=prefix_lens.int(),
                first_keys=self._first_keys(prefix_lens),
                block_tables=committed.block_tables,
                ancestors=torch.zeros_like(committed.tokens),
                max_q=committed.max_entries,
                max_context=committed.max_context,
            ),
        )
        states = self._head.forward(self._head.fuse(features, self._ctx), batch, self._ctx)
        lines = committed.lines
        self._states.index_put_((lines,), states[last])
        # A row without entries is at its end, so the state of its line is useless.
        self._positions.index_put_((lines,), torch.where(counts > 0, newest, -1))

    def _first_keys(self, prefix_lens: Tensor) -> Tensor:
        """The first entry that is attended to, [B] int32; padding rows have no prefix."""
        if self._window is None:
            return prefix_lens.clamp(max=FIRST_ENTRY).int()
        first = (prefix_lens - self._window).clamp(min=FIRST_ENTRY)
        return first.minimum(prefix_lens).int()


def _all_greedy(roots: Roots) -> Roots:
    return replace(roots, temperatures=torch.zeros_like(roots.temperatures))


def _in_rows(trees: DraftTree, rows: Tensor, others: DraftTree) -> DraftTree:
    """`others` [B] with those of `rows` [B'] replaced by `trees` [B']."""
    place = torch.zeros_like(others.sizes)
    place[rows] = torch.arange(len(rows), device=rows.device)
    taken = torch.zeros_like(others.sizes, dtype=torch.bool)
    taken[rows] = True
    spread = DraftTree(
        trees.tokens[place],
        trees.parents[place],
        trees.depths[place],
        trees.ancestors[place],
        trees.sizes[place],
        trees.max_depth,
    )
    return spread.where(taken, others)
