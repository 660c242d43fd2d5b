"""The proposer around a draft head: keeps its cache in step with the target, and grows trees."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from drafter.growing import Grower, grow
from drafter.heads.interface import DraftBatch, DraftContext, DraftHead
from drafter.pending import Pending
from drafter.taps import FeatureCollector
from engine.kv.slots import Scratch
from engine.speculation.proposer import Accepted, Committed, Ints, Roots
from engine.step.shape import StaticShape, TreeShape
from engine.step.tree import DraftTree
from engine.transfer import download, upload
from kernels.ops import AttentionMeta

FIRST_ENTRY = 1  # there is no entry for position 0: no token before it, so no feature
MAX_PENDING = 64  # tokens; linear layers do not get cheaper per token with more of them

logger = logging.getLogger(__name__)


class DraftProposer:
    """Implements `RoundProposer`.

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
        self._device = ctx.kv.device
        # The last line is that of rows that are none, see `draft`.
        self._states = torch.zeros(
            num_lines + 1, hidden_size, dtype=ctx.ops.activation_dtype, device=self._device
        )
        self._positions = np.full(num_lines + 1, -1, dtype=np.int64)  # of the states
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
        features = upload(committed.features, self._device)
        self._pending.add(committed, self.tap.take(features))
        drafted, self._drafted = self._drafted, False
        if drafted or self._pending.num_tokens >= self._max_pending:
            self._settle()

    def _settle(self) -> None:
        """Let the head take in what is pending."""
        if self._pending.num_tokens == 0:
            return
        parts, by_layer = self._pending.merge()
        self._pending = Pending()
        counts = parts.cu.diff()
        last = parts.cu[1:].long() - 1
        self._positions[parts.lines.numpy()] = parts.positions[last].numpy()
        max_q, max_context = int(counts.max()), int(parts.positions.max()) + 1
        prefix_lens = (parts.positions[last] + 1 - counts).int()
        committed, last, prefix_lens = upload((parts, last, prefix_lens), self._device)
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
                max_q=max_q,
                max_context=max_context,
            ),
        )
        features = tuple(seen[committed.features] for seen in by_layer)
        self._take_in(batch, features, committed.lines, last)

    def _take_in(
        self, batch: DraftBatch, features: tuple[Tensor, ...], lines: Tensor, last: Tensor
    ) -> None:
        """Run entries through the head; entry last[b] leaves the state of line lines[b]."""
        states = self._head.forward(self._head.fuse(features, self._ctx), batch, self._ctx)
        self._states[lines] = states[last]

    def _propose(self, roots: Roots, shape: TreeShape) -> DraftTree:
        self._drafted = True
        self._settle()
        tree = DraftTree.roots(roots.tokens)
        limits = torch.where(self._ready(roots), roots.max_nodes, 1)
        for limit in torch.unique(limits).tolist():
            if limit > 1:  # rows with the same room grow together, within their own slots
                rows = (limits == limit).nonzero()[:, 0]
                grown = self._grow(roots.rows(rows), shape, limit)
                tree = tree.with_rows(rows, download(grown))
        return tree

    def _grow(self, roots: Roots, shape: TreeShape, limit: int) -> DraftTree:
        last = int(roots.positions.max()) + shape.slots_for(limit)
        any_sampled = self._shared_noise and bool((roots.temperatures > 0).any())
        grower = self._grower(upload(roots, self._device), last, any_sampled)
        if isinstance(shape, StaticShape):
            shape = shape.first(limit)
        else:
            shape = replace(shape, num_nodes=min(limit, shape.num_nodes))
        return grow(grower, shape, self._states[grower.roots.lines])

    def _grower(
        self, roots: Roots, max_context: int, any_sampled: bool, scratch: Scratch | None = None
    ) -> Grower:
        if not self._shared_noise:
            roots = replace(roots, temperatures=torch.zeros_like(roots.temperatures))
            any_sampled = False
        first_keys = self._first_keys(roots.positions.int())
        return Grower(self._head, self._ctx, roots, first_keys, max_context, any_sampled, scratch)

    def _ready(self, roots: Roots) -> Tensor:
        """Rows that may draft and whose root's state is known and sound, [B] bool."""
        known = self.knows(roots.lines.numpy(), roots.positions.numpy())
        wanted = (roots.max_nodes > 1) & torch.from_numpy(known)
        if not bool(wanted.any()):
            return wanted
        lines = upload(roots.lines, self._device)
        sound = download(self._states[lines].isfinite().all(dim=1))
        self.count_faults(int((wanted & ~sound).sum()))
        agreed = self._ctx.group.from_first(upload((wanted & sound).long(), self._device))
        return download(agreed).bool()

    def knows(self, lines: Ints, positions: Ints) -> NDArray[np.bool_]:
        known: NDArray[np.bool_] = self._positions[lines] == positions
        return known

    def count_faults(self, count: int) -> None:
        self.num_faults += count
        if count and not self._warned:
            self._warned = True
            logger.warning("the draft head gives numbers that are not finite; not drafting there")

    def draft(
        self, roots: Roots, shape: TreeShape, max_context: int, any_sampled: bool, scratch: Scratch
    ) -> tuple[DraftTree, Tensor]:
        states = self._states[roots.lines]
        sound = states.isfinite().all(dim=1)
        reach = torch.where(roots.max_nodes > 1, shape.slots_for(1), roots.max_nodes)
        room = replace(roots, max_nodes=torch.maximum(reach, roots.max_nodes))
        tree = grow(self._grower(room, max_context, any_sampled, scratch), shape, states)
        sizes = torch.where(sound, roots.max_nodes, roots.max_nodes.clamp(max=1))
        behind = torch.arange(tree.tokens.shape[1], device=sizes.device) >= sizes[:, None]
        return replace(tree, parents=tree.parents.masked_fill(behind, -1), sizes=sizes), sound

    def absorb(self, accepted: Accepted, max_context: int) -> None:
        num_rows, per_row = accepted.tokens.shape
        prefix_lens = accepted.positions[:, 0].int()
        first_of_row = torch.arange(num_rows + 1, device=prefix_lens.device) * per_row
        batch = DraftBatch(
            token_ids=accepted.tokens.flatten(),
            positions=accepted.positions.flatten(),
            slots=accepted.slots.flatten(),
            attention=AttentionMeta(
                cu_q=first_of_row.int(),
                prefix_lens=prefix_lens,
                first_keys=self._first_keys(prefix_lens),
                block_tables=accepted.block_tables,
                ancestors=accepted.seen.flatten(),
                max_q=per_row,
                max_context=max_context,
            ),
        )
        features = self.tap.take(accepted.features.flatten())
        self._take_in(batch, features, accepted.lines, first_of_row[:-1] + accepted.last)

    def absorbed(self, lines: Ints, positions: Ints) -> None:
        self._positions[lines] = positions

    def _first_keys(self, prefix_lens: Tensor) -> Tensor:
        """The first entry that is looked at, [B] int32; rows that are none have no prefix."""
        if self._window is None:
            return prefix_lens.clamp(max=FIRST_ENTRY)
        return (prefix_lens - self._window).clamp(min=FIRST_ENTRY).minimum(prefix_lens)
