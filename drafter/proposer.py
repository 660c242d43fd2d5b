"""The proposer around a draft head: keeps its cache in step with the target, and grows trees."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch
from torch import Tensor

from drafter.growing import Grower, grow_dynamic, grow_static
from drafter.heads.interface import DraftBatch, DraftContext, DraftHead
from drafter.pending import Pending
from drafter.taps import FeatureCollector
from engine.spec.proposer import Committed, Roots
from engine.spec.shape import StaticShape, TreeShape
from engine.spec.tree import DraftTree
from kernels.ops import AttentionMeta

FIRST_ENTRY = 1  # there is no entry for position 0: no token before it, so no feature
MAX_PENDING = 64  # tokens; linear layers do not get cheaper per token with more of them

logger = logging.getLogger(__name__)


class DraftProposer:
    """Implements `Proposer`.

    The entry made from token i and the target's feature of token i - 1 lies in slot i, in pages of
    its own under the target's block tables: prefix hits, preemption and release follow by
    themselves. After each step the newest token of a row (its next root) has its entry already, and
    its state is kept per line until `propose` grows a tree from it.

    While it drafts nothing, steps only collect features, and the head takes them in together: once
    there are `max_pending` tokens, before its next tree, and before rows come or go. So nobody
    finds a block of the prefix cache without its entries, and no entry is written to a block that
    has passed to another row.
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
        """`window`: entries further back are not looked at; None for all. Without `shared_noise`
        drafts are ranked by likelihood alone, as if all requests were greedy. `max_pending`: 1 puts
        nothing off."""
        self.tap = FeatureCollector(head.tap_layers)
        self._head = head
        self._ctx = ctx
        self._window = window
        self._shared_noise = shared_noise
        device = ctx.kv.keys[0].device
        self._states = torch.zeros(
            num_lines, hidden_size, dtype=ctx.ops.activation_dtype, device=device
        )
        self._positions = torch.full((num_lines,), -1, dtype=torch.int64, device=device)
        self._warned = False
        self._max_pending = max_pending
        self._pending = Pending()
        self._drafted = False  # whether trees were asked for in this step
        self.failed = False
        self.num_faults = 0  # rows whose head gave numbers that are not finite

    def settle(self) -> None:
        if self.failed:
            return
        try:
            self._settle()
        except Exception:  # noqa: BLE001  (a head may fail in any way; the text must not)
            self._give_up()

    def admit(self, line: int) -> None:
        self._positions[line] = -1

    def extend(self, committed: Committed, hidden: Tensor) -> None:  # noqa: ARG002  (tap saw it)
        if self.failed:
            return
        try:
            self._extend(committed)
        except Exception:  # noqa: BLE001  (a head may fail in any way; the text must not)
            self._give_up()

    def propose(self, roots: Roots, shape: TreeShape) -> DraftTree:
        if self.failed:
            return DraftTree.roots(roots.tokens)
        try:
            return self._propose(roots, shape)
        except Exception:  # noqa: BLE001  (a head may fail in any way; the text must not)
            self._give_up()
            return DraftTree.roots(roots.tokens)

    def _give_up(self) -> None:
        """Draft nothing any more: what the head has in its cache can no longer be trusted. Of
        several ranks, others may wait for this one's part: then the exception goes on."""
        if self._ctx.group.size > 1:
            raise
        self.failed = True
        self._pending = Pending()
        logger.exception("the draft head failed; decoding goes on without it")

    def _extend(self, committed: Committed) -> None:
        if not self._pending.followed_by(committed):  # a step done once more, to measure it
            self._settle()
        self._pending.add(committed, self.tap.take(committed.features))
        drafted, self._drafted = self._drafted, False
        if drafted or self._pending.num_tokens >= self._max_pending:
            self._settle()

    def _settle(self) -> None:
        """Let the head take in what is pending."""
        if self._pending.num_tokens == 0:
            return
        committed, features = self._pending.merge()
        self._pending = Pending()
        counts = committed.cu.diff()
        last = committed.cu[1:].long() - 1
        prefix_lens = (committed.positions[last] + 1 - counts).int()
        batch = DraftBatch(
            token_ids=committed.tokens,
            positions=committed.positions,
            slots=committed.slots,
            attention=AttentionMeta(
                cu_q=committed.cu,
                prefix_lens=prefix_lens,
                first_keys=self._first_keys(prefix_lens),
                block_tables=committed.block_tables,
                ancestors=torch.zeros_like(committed.tokens),
                max_q=int(counts.max()),
                max_context=int(committed.positions.max()) + 1,
            ),
        )
        states = self._head.forward(self._head.fuse(features, self._ctx), batch, self._ctx)
        self._states[committed.lines] = states[last]
        self._positions[committed.lines] = committed.positions[last]

    def _propose(self, roots: Roots, shape: TreeShape) -> DraftTree:
        self._drafted = True
        self._settle()
        tree = DraftTree.roots(roots.tokens)
        limits = torch.where(self._ready(roots), roots.max_nodes, 1)
        for limit in torch.unique(limits).tolist():
            if limit > 1:  # rows with the same room grow together, within their own slots
                rows = (limits == limit).nonzero()[:, 0]
                tree = tree.with_rows(rows, self._grow(roots.rows(rows), shape, limit))
        return tree

    def _grow(self, roots: Roots, shape: TreeShape, limit: int) -> DraftTree:
        if not self._shared_noise:
            roots = replace(roots, temperatures=torch.zeros_like(roots.temperatures))
        grower = Grower(self._head, self._ctx, roots, self._first_keys(roots.positions.int()))
        states = self._states[roots.lines]
        if isinstance(shape, StaticShape):
            return grow_static(grower, shape.first(limit), states)
        return grow_dynamic(grower, replace(shape, num_nodes=min(limit, shape.num_nodes)), states)

    def _ready(self, roots: Roots) -> Tensor:
        """Rows that may draft and whose root's state is known and sound, [B] bool."""
        wanted = (roots.max_nodes > 1) & (self._positions[roots.lines] == roots.positions)
        if not bool(wanted.any()):
            return wanted
        sound = self._states[roots.lines].isfinite().all(dim=1)
        faults = int((wanted & ~sound).sum())
        if faults:
            self.num_faults += faults
            if not self._warned:
                self._warned = True
                logger.warning(
                    "the draft head gives numbers that are not finite; not drafting there"
                )
        return self._ctx.group.from_first((wanted & sound).long()).bool()

    def _first_keys(self, prefix_lens: Tensor) -> Tensor:
        """The first entry that is looked at, [B] int32."""
        if self._window is None:
            return torch.full_like(prefix_lens, FIRST_ENTRY)
        return (prefix_lens - self._window).clamp(min=FIRST_ENTRY)
