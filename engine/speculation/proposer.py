"""The contract by which draft heads enter the engine, and the proposer that drafts nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import torch
from torch import Tensor

from engine.step.batch import FeatureTap
from engine.step.shape import TreeShape
from engine.step.tree import DraftTree


@dataclass(frozen=True, slots=True)
class Roots:
    """The newest token of every row, from which its tree grows. Tensors of the device."""

    lines: Tensor  # [B] int64, the row's line: its place in any state that a proposer keeps
    tokens: Tensor  # [B] int64
    positions: Tensor  # [B] int64, of the root; its slot is that of the same position
    max_nodes: Tensor  # [B] int64, root included; 1: no draft for this row, 0: a padding row
    block_tables: Tensor  # [B, max_blocks] int32
    temperatures: Tensor  # [B] float32, 0 is greedy
    seeds: Tensor  # [B] int64, the bits of the unsigned seed

    def rows(self, which: Tensor) -> Roots:
        """A selection of the rows."""
        return Roots(*(getattr(self, part.name)[which] for part in fields(self)))


@dataclass(frozen=True, slots=True)
class DraftLimits:
    """What holds for all rows of a step, known to the host."""

    exact: bool  # the host may look at values, and leaves out rows that do not draft
    any_sampled: bool  # False promises that all rows are greedy
    max_context: int  # no entry of the cache lies as far back
    max_len: int  # positions of a sequence: no position is as high


@dataclass(frozen=True, slots=True)
class Drafted:
    """Trees, and which rows the head gave numbers for that are not finite."""

    tree: DraftTree
    faults: Tensor  # [B] bool: the row would have had a tree


@dataclass(frozen=True, slots=True)
class Committed:
    """Tokens that the step committed, each with the hidden state of the token before it. Tensors of
    the device.

    Entry c is the token at `positions[c]`; the target has seen the token at `positions[c] - 1`, and
    `features[c]` is where among the T computed tokens its hidden state lies. Entries of row b are
    cu[b] .. cu[b+1]-1, at consecutive positions; entries from cu[B] on are padding, and their slots
    are scratch. The last entry of a row may be the root of its next tree, whose own KV the target
    has yet to compute.
    """

    lines: Tensor  # [B] int64
    cu: Tensor  # [B + 1] int64
    features: Tensor  # [C] int64
    tokens: Tensor  # [C] int64
    positions: Tensor  # [C] int64
    slots: Tensor  # [C] int64
    block_tables: Tensor  # [B, max_blocks] int32
    max_entries: int  # of one row, at most
    max_context: int  # no entry of the cache lies as far back
    exact: bool  # the host may look at values; there is no padding


class Proposer(Protocol):
    """Proposes trees and learns what was committed.

    Nothing is assumed about how a tree is made (one forward per level, one for all levels, no
    model at all). Every committed token passes through `take`, also when trees are cut down to
    the root, so that drafting can resume at any step. `draft` and `take` never wait for a device,
    so that a CUDA graph can hold them.
    """

    @property
    def lookahead(self) -> int:
        """Slots it needs after a row's last token: 1 if it keeps an entry for the next root; 0 if
        it keeps no entries at all, and then `take` is not called."""
        ...

    @property
    def tap(self) -> FeatureTap | None:
        """What reads the target's hidden states for this proposer, if anything has to."""
        ...

    @property
    def failed(self) -> bool:
        """Whether it broke down and has drafted nothing since."""
        ...

    def settle(self) -> None:
        """Rows are about to leave or to enter: finish what was put off. Until now every block is
        still its row's as far as `take` was told; afterwards others may read and write it."""
        ...

    def admit(self, lines: Sequence[int]) -> None:
        """New sequences take these lines; whatever was known about them is stale."""
        ...

    def draft(self, roots: Roots, shape: TreeShape, limits: DraftLimits) -> Drafted:
        """One tree per row, of at most `max_nodes` nodes. A row it knows nothing about gets its
        root only."""
        ...

    def take(self, committed: Committed, hidden: Tensor) -> None:
        """Take in committed tokens. `hidden` [T, H] is the target's output after its final norm;
        the tap has seen the same T tokens."""
        ...


class RootProposer:
    """Plain decoding: the tree is its root."""

    lookahead = 0
    tap: FeatureTap | None = None
    failed = False

    def settle(self) -> None:
        """Nothing is put off."""

    def admit(self, lines: Sequence[int]) -> None:
        """No state, nothing stale."""

    def draft(self, roots: Roots, shape: TreeShape, limits: DraftLimits) -> Drafted:  # noqa: ARG002
        tree = DraftTree.roots(roots.tokens)
        return Drafted(tree, torch.zeros_like(roots.tokens, dtype=torch.bool))

    def take(self, committed: Committed, hidden: Tensor) -> None:
        """Nothing to learn: a root needs no draft state."""
