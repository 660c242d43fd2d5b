"""The proposer around a draft head: keeps its cache in step with the target, and grows trees."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch
from torch import Tensor

from drafter.growing import Grower, grow_dynamic, grow_static
from drafter.heads.interface import DraftBatch, DraftContext, DraftHead
from drafter.taps import FeatureCollector
from engine.spec.proposer import Committed, Roots
from engine.spec.shape import StaticShape, TreeShape
from engine.spec.tree import DraftTree
from kernels.ops import AttentionMeta

FIRST_ENTRY = 1  # there is no entry for position 0: no token before it, so no feature

logger = logging.getLogger(__name__)


class DraftProposer:
    """Implements `Proposer`.

    The entry made from token i and the target's feature of token i - 1 lies in slot i, in pages of
    its own under the target's block tables: prefix hits, preemption and release follow by
    themselves. After each step the newest token of a row (its next root) has its entry already, and
    its state is kept per line until `propose` grows a tree from it.
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
    ) -> None:
        """`window`: entries further back are not looked at; None for all. Without `shared_noise`
        drafts are ranked by likelihood alone, as if all requests were greedy."""
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
        self._broken = False
        self.num_faults = 0  # rows whose head gave numbers that are not finite

    def admit(self, line: int) -> None:
        self._positions[line] = -1

    def extend(self, committed: Committed, hidden: Tensor) -> None:  # noqa: ARG002  (tap saw it)
        if self._broken:
            return
        try:
            self._extend(committed)
        except Exception:  # noqa: BLE001  (a head may fail in any way; the text must not)
            self._give_up()

    def propose(self, roots: Roots, shape: TreeShape) -> DraftTree:
        if self._broken:
            return DraftTree.roots(roots.tokens)
        try:
            return self._propose(roots, shape)
        except Exception:  # noqa: BLE001  (a head may fail in any way; the text must not)
            self._give_up()
            return DraftTree.roots(roots.tokens)

    def _give_up(self) -> None:
        """Draft nothing any more: what the head has in its cache can no longer be trusted."""
        self._broken = True
        logger.exception("the draft head failed; decoding goes on without it")

    def _extend(self, committed: Committed) -> None:
        counts = committed.cu.diff()
        filled = counts > 0
        if not bool(filled.any()):
            return
        last = committed.cu[1:][filled].long() - 1
        prefix_lens = (committed.positions[last] + 1 - counts[filled]).int()
        batch = DraftBatch(
            token_ids=committed.tokens,
            positions=committed.positions,
            slots=committed.slots,
            attention=AttentionMeta(
                cu_q=torch.cat((committed.cu[:1], committed.cu[1:][filled])),
                prefix_lens=prefix_lens,
                first_keys=self._first_keys(prefix_lens),
                block_tables=committed.block_tables[filled].contiguous(),
                ancestors=torch.zeros_like(committed.tokens),
                max_q=int(counts.max()),
                max_context=int(committed.positions.max()) + 1,
            ),
        )
        features = self._head.fuse(self.tap.take(committed.features))
        states = self._head.forward(features, batch, self._ctx)
        lines = committed.lines[filled]
        self._states[lines] = states[last]
        self._positions[lines] = committed.positions[last]

    def _propose(self, roots: Roots, shape: TreeShape) -> DraftTree:
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
        return wanted & sound

    def _first_keys(self, prefix_lens: Tensor) -> Tensor:
        """The first entry that is looked at, [B] int32."""
        if self._window is None:
            return torch.full_like(prefix_lens, FIRST_ENTRY)
        return (prefix_lens - self._window).clamp(min=FIRST_ENTRY)
