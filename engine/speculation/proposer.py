"""The interface between engine and draft heads, and the proposer that drafts nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import torch
from torch import Tensor

from engine.messages import DraftState
from engine.step.batch import FeatureTap
from engine.step.shape import TreeShape
from engine.step.tree import DraftTree
from kernels.packing.entries import PackedEntries


@dataclass(frozen=True, slots=True)
class Roots:
    """The newest token of every row, from which its tree grows. Device tensors."""

    lines: Tensor  # [B] int64, the row's line: its index in any state that a proposer keeps
    tokens: Tensor  # [B] int64
    positions: Tensor  # [B] int64, of the root; its slot is that of the same position
    max_nodes: Tensor  # [B] int64, root included; 1: no draft for this row, 0: a padding row
    block_tables: Tensor  # [B, max_blocks] int32
    temperatures: Tensor  # [B] float32, 0 is greedy
    seeds: Tensor  # [B] int64, the bits of the unsigned seed
    top_k: Tensor  # [B] int64, the vocabulary size when off
    top_p: Tensor  # [B] float32, 1 when off
    min_p: Tensor  # [B] float32, 0 when off

    def rows(self, which: Tensor) -> Roots:
        """A selection of the rows."""
        return Roots(*(getattr(self, part.name)[which] for part in fields(self)))


@dataclass(frozen=True, slots=True)
class DraftLimits:
    """Host values that hold for all rows of a step."""

    exact: bool  # the host may read values, and leaves out rows that do not draft
    any_sampled: bool  # False promises that all rows are greedy
    is_filtered: bool  # False promises that no row has top-k, top-p or min-p
    max_context: int  # all positions in the cache are below it
    max_len: int  # positions of a sequence: all are below it


@dataclass(frozen=True, slots=True)
class Drafted:
    """Trees, and the rows for which the head's outputs were not finite."""

    tree: DraftTree
    faults: Tensor  # [B] bool: the row would have had a tree


@dataclass(frozen=True, slots=True)
class Committed:
    """Tokens that the step committed, each with the hidden state of the token before it. Device
    tensors.

    Entry c is the token at `positions[c]`. The target has computed the token at `positions[c] - 1`;
    its hidden state is at index `features[c]` among the T tokens of the step. Entries of row b are
    cu[b] .. cu[b+1]-1, at consecutive positions; entries from cu[B] on are padding with scratch
    slots. The last entry of a row may be the root of its next tree, whose KV the target has not
    computed yet.
    """

    lines: Tensor  # [B] int64
    cu: Tensor  # [B + 1] int64
    features: Tensor  # [C] int64
    tokens: Tensor  # [C] int64
    positions: Tensor  # [C] int64
    slots: Tensor  # [C] int64
    block_tables: Tensor  # [B, max_blocks] int32
    max_entries: int  # bound of the entries of one row
    max_context: int  # all positions in the cache are below it
    exact: bool  # the host may read values; there is no padding
    packed: PackedEntries | None = None  # where one kernel made all of this, and more


@dataclass(frozen=True, slots=True)
class Singles:
    """What a step committed in which every row had one token and no draft. Host tensors, not yet
    worked on, so that a proposer that needs them late, or never, loses no time with them."""

    lines: Tensor  # [B] int64
    tokens: Tensor  # [B] int64, the token after each row's own
    positions: Tensor  # [B] int64, of these
    ends: Tensor  # [B] int64, position after the last slot of each row; others are left out
    block_tables: Tensor  # [B, columns] int32


class Proposer(Protocol):
    """Proposes trees and takes committed tokens.

    A tree may be made in any way (one forward per level, one for all levels, no model at all).
    Every committed token passes through `take` or `take_singles`, even when trees are cut to the
    root, so that drafting can resume at any step. `draft` and `take` never wait for the device, so
    that a CUDA graph can capture them.
    """

    @property
    def lookahead(self) -> int:
        """Slots it needs after a row's last token: 1 if it keeps an entry for the next root; 0 if
        it keeps no entries at all, and then `take` is not called."""
        ...

    @property
    def tap(self) -> FeatureTap | None:
        """Records the target's hidden states for this proposer; None if it needs none."""
        ...

    @property
    def failed(self) -> bool:
        """Whether it has failed and drafts nothing any more."""
        ...

    def release(self, lines: Sequence[int]) -> None:
        """These rows leave. Their blocks are still theirs; afterwards other rows may read and write
        them."""
        ...

    def admit(self, lines: Sequence[int]) -> None:
        """New sequences take these lines; earlier state of the lines is stale."""
        ...

    def adopt(self, line: int, state: DraftState, blocks: Sequence[int]) -> None:
        """A line that was just admitted has its first `blocks` from another engine, with whatever
        `pages` keep for them, and this state."""
        ...

    def hand_over(self, line: int) -> DraftState | None:
        """Complete the entries of a running row in its pages; its state, if it has one."""
        ...

    @property
    def pages(self) -> Sequence[Tensor]:
        """What it keeps for each block, each [num_blocks, ...]."""
        ...

    def draft(self, roots: Roots, shape: TreeShape, limits: DraftLimits) -> Drafted:
        """One tree per row, of at most `max_nodes` nodes. A row without state gets only its
        root."""
        ...

    def take(self, committed: Committed, hidden: Tensor) -> None:
        """Take committed tokens. `hidden` [T, H] is the target's output after its final norm, for
        the same T tokens that the tap has recorded."""
        ...

    def take_singles(self, singles: Singles, hidden: Tensor) -> None:
        """The same for a step of single tokens, where the host may read values. Feature b, that of
        the token before, is row b of `hidden` and of what the tap has recorded."""
        ...


class RootProposer:
    """Plain decoding: every tree is only its root."""

    lookahead = 0
    tap: FeatureTap | None = None
    failed = False

    pages: Sequence[Tensor] = ()

    def adopt(self, line: int, state: DraftState, blocks: Sequence[int]) -> None:
        """There is no state."""

    def hand_over(self, line: int) -> DraftState | None:  # noqa: ARG002
        return None

    def release(self, lines: Sequence[int]) -> None:
        """There is no state."""

    def admit(self, lines: Sequence[int]) -> None:
        """There is no state."""

    def draft(self, roots: Roots, shape: TreeShape, limits: DraftLimits) -> Drafted:  # noqa: ARG002
        tree = DraftTree.roots(roots.tokens)
        return Drafted(tree, torch.zeros_like(roots.tokens, dtype=torch.bool))

    def take(self, committed: Committed, hidden: Tensor) -> None:
        """There is no state to update."""

    def take_singles(self, singles: Singles, hidden: Tensor) -> None:
        """There is no state to update."""
