"""The proposer around a draft head: keeps its cache in step with the target, and grows trees."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from drafter.growing import Grower, grow
from drafter.heads.interface import DraftBatch, DraftContext, DraftHead, ParallelHead
from drafter.marginals import Marginals, PathTables, grow_at_once
from drafter.pending import Features, Part, Pending
from drafter.static_levels import StaticLevels
from drafter.taps import FeatureCollector
from engine.kv.scratch import Scratch
from engine.messages import DraftState
from engine.speculation.planner import LATE_STEPS
from engine.speculation.proposer import Committed, Drafted, DraftLimits, Roots, Singles
from engine.step.shape import TreeShape
from engine.step.tree import DraftTree
from kernels.drafting.nodes import ReadyRoots, RootStates
from kernels.ops import AttentionMeta

FIRST_ENTRY = 1  # position 0 has no entry: no token is before it, so there is no feature
RESTING_SHARE = 0.1  # of the rows; if no more draft, prompts are taken late, too
FEW_TOKENS = 64  # tokens that a product takes in the time of one, as it waits for its weights
COUNT_DECAY = 0.95  # weight of the past per step in how many rows draft

logger = logging.getLogger(__name__)


class DraftProposer:
    """Implements `Proposer`.

    The entry of token i is computed from that token and the target's feature of token i - 1. It
    lies in slot i of the head's own pages, under the target's block tables, so prefix hits,
    preemption and release need no extra work. After each step the newest token of a row (its next
    root) already has its entry, and its state is kept per line until `draft` grows a tree from it.

    If the host may read values, only rows that draft are kept up to date. Of others, the features
    of the newest tokens are kept: when such a row drafts again, these are taken, and the head
    attends to nothing before them. So tokens of rows that do not draft cost nothing. While hardly
    any row drafts, prompts are treated alike. Which slots have entries is noted, so that a prefix
    hit is attended to only as far back as nothing is missing.
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
        late_steps: int = LATE_STEPS,
        *,
        eager: bool = False,
    ) -> None:
        """`window`: number of newest entries that the head attends to; None: all. Without
        `shared_noise` drafts are ranked by likelihood alone, as if all requests were greedy.
        `late_steps`: for so many steps, tokens of rows that do not draft are kept. `eager`: prompts
        are taken at once even while no row drafts, for another engine."""
        self.tap = FeatureCollector(head.tap_layers)
        self.failed = False
        self._head = head
        self._parallel = head if isinstance(head, ParallelHead) else None
        self._ctx = ctx
        self._window = window
        self._shared_noise = shared_noise
        self._scratch = Scratch(ctx.kv.num_blocks - 1, ctx.kv.block_size)
        device = ctx.kv.device
        self._levels = StaticLevels(device)
        self._paths = PathTables(device)
        # By line; padding rows use the last line.
        self._states = torch.zeros(
            num_lines + 1, hidden_size, dtype=ctx.ops.activation_dtype, device=device
        )
        self._positions = torch.full((num_lines + 1,), -1, dtype=torch.int64, device=device)
        # The head attends to entries from here on, by line.
        self._firsts = torch.full_like(self._positions, FIRST_ENTRY, dtype=torch.int32)
        self._pending = Pending(late_steps, ctx.kv.block_size)
        self._has_entry = torch.zeros(ctx.kv.num_blocks * ctx.kv.block_size, dtype=torch.bool)
        self._ends: dict[int, int] = {}  # by line: position after the newest entry
        self._nexts: dict[int, int] = {}  # by line: position after the newest token
        self._drafting: set[int] = set()  # lines that this step grew trees for
        self._eager = eager
        self._num_drafting = 1.0  # rows that draft, lately

    def admit(self, lines: Sequence[int]) -> None:
        if not lines:
            return
        self._complete_entries(list(self._ends))
        at = torch.tensor(lines).to(self._positions.device)
        self._positions.index_fill_(0, at, -1)

    def release(self, lines: Sequence[int]) -> None:
        self._complete_entries([line for line in lines if line in self._ends])
        self._pending.drop(lines)
        for line in lines:
            self._ends.pop(line, None)
            self._nexts.pop(line, None)

    def _complete_entries(self, lines: Sequence[int]) -> None:
        """Make the entries of rows of which none was given up: others may go on after them."""
        if self.failed:
            return
        try:
            self._collect_singles()
            self._run_pending([line for line in lines if self._pending.is_whole(line)])
        except Exception:  # noqa: BLE001  (a head may fail in any way; the text must not)
            self._give_up()

    @property
    def pages(self) -> Sequence[Tensor]:
        kv = self._ctx.kv
        return *kv.keys, *kv.values, self._has_entry.view(kv.num_blocks, kv.block_size)

    def hand_over(self, line: int) -> DraftState | None:
        self._complete_entries([line])
        position = int(self._positions[line])
        if self.failed or position < 0:
            return None
        state = self._states[line].cpu().contiguous().view(torch.uint8)
        return DraftState(position, state.numpy().tobytes())

    def adopt(self, line: int, state: DraftState, blocks: Sequence[int]) -> None:
        like = self._states[line]
        known = torch.frombuffer(bytearray(state.state), dtype=like.dtype)
        self._states[line] = known.to(like.device)
        self._positions[line] = state.position
        self._ends[line] = self._nexts[line] = state.position + 1
        has_entry = self._has_entry.view(-1, self._ctx.kv.block_size)[list(blocks)].flatten()
        self._firsts[line] = self._first_of(has_entry[: state.position])

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

    def take_singles(self, singles: Singles, hidden: Tensor) -> None:  # noqa: ARG002
        if self.failed:
            return
        self._note_drafting()
        self._pending.add_singles(singles, self.tap.take_all())
        if self._pending.num_singles == self._pending.most:
            self._collect_singles()

    def _give_up(self) -> None:
        """Stop drafting: the head's cache can no longer be trusted. With several ranks the
        exception is raised again, since others may wait for this rank's part."""
        if self._ctx.group.size > 1:
            raise
        self.failed = True
        self._pending.drop(list(self._pending.lines))
        logger.exception("the draft head failed; decoding continues without it")

    def _draft(self, roots: Roots, shape: TreeShape, limits: DraftLimits) -> Drafted:
        """Rows draft if the state of their root is known and finite; others keep their root."""
        if limits.exact:
            self._drafting = set(roots.lines[roots.max_nodes > 1].tolist())
            self._collect_singles()
            self._run_pending(self._drafting, newest=self._pending.most)
        kept = RootStates(
            lines=roots.lines,
            positions=roots.positions,
            max_nodes=roots.max_nodes,
            states=self._states,
            state_positions=self._positions,
            firsts=self._firsts,
            num_drafted=shape.slots_for(1),
            window=self._window,
        )
        found = self._ctx.ops.ready_roots(kept)
        if not limits.exact:
            return Drafted(self._grow(roots, found, shape, limits), found.faults)
        # All ranks must run the head on the same rows.
        ready = self._ctx.group.from_first(found.ready.long()).bool()
        found = replace(found, sizes=roots.max_nodes)
        if bool(ready.all()):
            return Drafted(self._grow(roots, found, shape, limits), found.faults)
        tree = DraftTree.roots(roots.tokens)
        if bool(ready.any()):
            rows = ready.nonzero()[:, 0]
            grown = self._grow(roots.rows(rows), found.rows(rows), shape, limits)
            tree = _in_rows(grown, rows, tree)
        return Drafted(tree, found.faults)

    def _grow(
        self, roots: Roots, found: ReadyRoots, shape: TreeShape, limits: DraftLimits
    ) -> DraftTree:
        """Trees of `shape`, cut to the nodes that each row has room for."""
        grower = Grower(
            head=self._head,
            ctx=self._ctx,
            roots=roots if self._shared_noise else _all_greedy(roots),
            num_slots=found.num_slots,
            first_keys=found.first_keys,
            sizes=found.sizes,
            limits=limits if self._shared_noise else replace(limits, any_sampled=False),
            scratch=self._scratch,
            levels=self._levels,
        )
        if self._parallel is None:
            return grow(shape, grower, found.states)
        return grow_at_once(shape, Marginals(grower, self._parallel, found.states), self._paths)

    def _take(self, committed: Committed) -> None:
        if not committed.exact:
            self._take_padded(committed)
            return
        features = self.tap.take(committed.features)
        self._collect_singles()
        counts, drafting = committed.cu.diff(), self._drafting
        self._note_drafting()
        if len(committed.tokens) == 0:
            return
        self._note_tokens(committed, counts.tolist())
        at_once = torch.tensor([line in drafting for line in committed.lines.tolist()])
        if self._eager or self._num_drafting > RESTING_SHARE * len(counts):  # prompts, too
            at_once |= counts > 1
        part = Part(committed, features)
        at_once &= counts > 0
        if not bool(at_once.all()):
            self._pending.add(part.rows(~at_once, self._pending.most))
        if bool(at_once.any()):
            now = part.rows(at_once)
            self._run_pending(now.committed.lines.tolist())
            self._run_entries(now.committed, now.features)

    def _take_padded(self, committed: Committed) -> None:
        """Fuse few tokens first and let the head gather them: that takes fewer kernels."""
        if self.tap.num_tokens > max(FEW_TOKENS, len(committed.tokens)):
            self._run_entries(committed, self.tap.take(committed.features))
        else:
            self._run_entries(committed, self.tap.take_all(), committed.features)

    def _note_drafting(self) -> None:
        """Note how many rows of a step drafted."""
        self._num_drafting += (1 - COUNT_DECAY) * (len(self._drafting) - self._num_drafting)
        self._drafting = set()

    def _collect_singles(self) -> None:
        """Make the single tokens of several steps pending ones."""
        num_steps, part = self._pending.num_singles, self._pending.join()
        if part is not None:
            self._note_tokens(part.committed, part.committed.cu.diff().tolist())
            self._pending.add(part, num_steps)

    def _note_tokens(self, committed: Committed, counts: Sequence[int]) -> None:
        """Note which tokens there are. Entries in their slots are those of other tokens."""
        self._has_entry[committed.slots] = False
        starts = committed.positions[committed.cu[:-1].clamp(max=len(committed.tokens) - 1)]
        for line, start, count in zip(
            committed.lines.tolist(), starts.tolist(), counts, strict=True
        ):
            if count == 0:
                continue
            if self._nexts.get(line, start) != start:  # a step that is repeated to measure it
                self._pending.drop([line])
            self._nexts[line] = start + count
            if self._ends.get(line, start) > start:
                self._ends[line] = start

    def _run_pending(self, lines: Iterable[int], newest: int | None = None) -> None:
        """Run the pending tokens of these lines through the head, the `newest` of each at most."""
        part = self._pending.take(lines)
        if part is not None:
            if newest is not None and part.committed.max_entries > newest:
                part = part.rows(torch.ones_like(part.committed.lines).bool(), newest)
            self._run_entries(part.committed, part.features)

    def _run_entries(
        self, committed: Committed, features: Features, feature_of: Tensor | None = None
    ) -> None:
        """Run entries through the head, and keep the state of each row's last entry by line.
        `feature_of`: which of the features each entry takes; None: they are in order."""
        entries = _entries_of(committed)
        if committed.exact:
            self._note_entries(committed, entries.prefix_lens)
        batch = DraftBatch(
            token_ids=committed.tokens,
            positions=committed.positions,
            slots=committed.slots,
            attention=AttentionMeta(
                cu_q=entries.cu_q,
                prefix_lens=entries.prefix_lens,
                first_keys=self._ctx.ops.first_keys(
                    self._firsts, committed.lines, entries.prefix_lens, self._window
                ),
                block_tables=committed.block_tables,
                ancestors=entries.masks,
                max_q=committed.max_entries,
                max_context=committed.max_context,
            ),
            feature_of=feature_of,
        )
        states = self._head.forward(self._head.fuse(features, self._ctx), batch, self._ctx)
        # A row without entries is at its end, so the state of its line is useless.
        kept = self._states, self._positions
        self._ctx.ops.keep_states(*kept, committed.lines, states, entries.last, entries.newest)

    def _note_entries(self, committed: Committed, prefix_lens: Tensor) -> None:
        """Note that these tokens have entries, and from where on none is missing before them."""
        counts, block_size = committed.cu.diff().tolist(), self._ctx.kv.block_size
        for row, line in enumerate(committed.lines.tolist()):
            start = int(prefix_lens[row])
            if line not in self._ends:
                before = torch.arange(start)
                table = committed.block_tables[row].long()
                slots = table[before // block_size] * block_size + before % block_size
                self._firsts[line] = self._first_of(self._has_entry[slots])
            elif self._ends[line] != start:
                self._firsts[line] = start
            self._ends[line] = start + counts[row]
        self._has_entry[committed.slots] = True

    @staticmethod
    def _first_of(has_entry: Tensor) -> int:
        """The first position after which no entry is missing."""
        missing = (~has_entry).nonzero()
        return max(FIRST_ENTRY, int(missing[-1]) + 1 if len(missing) else 0)


class _Entries(NamedTuple):
    """Entries by row."""

    cu_q: Tensor  # [B + 1] int32
    prefix_lens: Tensor  # [B] int32, position of the row's first entry; 0 without one
    last: Tensor  # [B] int64, index of its last entry
    newest: Tensor  # [B] int64, position of its last entry; -1 without one
    masks: Tensor  # [C] int64 zeros: the entries of a row are causal


def _entries_of(committed: Committed) -> _Entries:
    packed = committed.packed
    if packed is not None:
        return _Entries(packed.cu_q, packed.prefix_lens, packed.last, packed.newest, packed.masks)
    counts = committed.cu.diff()
    last = (committed.cu[1:] - 1).clamp(min=0)
    newest = committed.positions[last]
    return _Entries(
        cu_q=committed.cu.int(),
        prefix_lens=torch.where(counts > 0, newest + 1 - counts, 0).int(),
        last=last,
        newest=torch.where(counts > 0, newest, -1),
        masks=torch.zeros_like(committed.tokens),
    )


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
