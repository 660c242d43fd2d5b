"""The contract by which draft heads enter the engine, and the proposer that drafts nothing."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.kv.slots import Scratch
from engine.step.shape import TreeShape
from engine.step.taps import FeatureTap
from engine.step.tree import DraftTree

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Roots:
    """The rows that draw a token in this step, and the newest token of each: on the host, unless
    said otherwise."""

    lines: Tensor  # [B] int64, the row's line: its place in any state that a proposer keeps
    tokens: Tensor  # [B] int64
    positions: Tensor  # [B] int64, of the root; its slot is that of the same position
    max_nodes: Tensor  # [B] int64, root included; 1: no draft for this row
    block_tables: Tensor  # [B, max_blocks] int32
    temperatures: Tensor  # [B] float32, 0 is greedy
    seeds: Tensor  # [B] int64, the bits of the unsigned seed

    def rows(self, which: Tensor) -> Roots:
        """A selection of the rows."""
        return Roots(*(getattr(self, part.name)[which] for part in fields(self)))


@dataclass(frozen=True, slots=True)
class Committed:
    """Tokens that the step committed, each with the hidden state of the token before it. Tensors of
    the host.

    Entry c is the token at `positions[c]`; the target has seen the token at `positions[c] - 1`, and
    `features[c]` is where among the T computed tokens its hidden state lies. Entries of row b are
    cu[b] .. cu[b+1]-1, at consecutive positions. The last entry of a row may be the root of its
    next tree, whose own KV the target has yet to compute.
    """

    lines: Tensor  # [B] int64
    cu: Tensor  # [B + 1] int32
    features: Tensor  # [C] int64
    tokens: Tensor  # [C] int64
    positions: Tensor  # [C] int64
    slots: Tensor  # [C] int64
    block_tables: Tensor  # [B, max_blocks] int32


class Proposer(Protocol):
    """Proposes trees and learns what was committed.

    Nothing is assumed about how a tree is made (one forward per level, one for all levels, no
    model at all). Every committed token passes through `extend`, also when trees are cut down to
    the root, so that drafting can resume at any step.
    """

    @property
    def lookahead(self) -> int:
        """Slots it needs behind a row's last token: 1 if it keeps an entry for the next root; 0 if
        it keeps no entries at all, and then `extend` is not called."""
        ...

    @property
    def tap(self) -> FeatureTap | None:
        """What reads the target's hidden states for this proposer, if anything has to."""
        ...

    @property
    def num_faults(self) -> int:
        """Trees that were not grown because of numbers that are not finite, since the start."""
        ...

    @property
    def failed(self) -> bool:
        """Whether it broke down and has drafted nothing since."""
        ...

    def settle(self) -> None:
        """Rows are about to leave or to enter: finish what was put off. Until now every block is
        still its row's as far as `extend` was told; afterwards others may read and write it."""
        ...

    def admit(self, line: int) -> None:
        """A new sequence takes this line; whatever was known about it is stale."""
        ...

    def propose(self, roots: Roots, shape: TreeShape) -> DraftTree:
        """One tree per row, of at most `max_nodes` nodes, on the host. A row it knows nothing about
        gets its root only."""
        ...

    def extend(self, committed: Committed, hidden: Tensor) -> None:
        """Take in committed tokens. `hidden` [T, H] is the target's output after its final norm;
        the tap has seen the same T tokens."""
        ...


@dataclass(frozen=True, slots=True)
class Accepted:
    """What a decode round committed, as `Committed` says it, but with one width for all B rows and
    on the device: entry e of row b is the e-th token it emitted."""

    lines: Tensor  # [B] int64
    last: Tensor  # [B] int64, the newest entry of each row; those behind are none
    features: Tensor  # [B, E] int64
    tokens: Tensor  # [B, E] int64
    positions: Tensor  # [B, E] int64
    slots: Tensor  # [B, E] int64, scratch for entries that are none
    seen: Tensor  # [B, E] int64 bit masks over the entries of the row
    block_tables: Tensor  # [B, max_blocks] int32


@runtime_checkable
class RoundProposer(Proposer, Protocol):
    """A proposer that can be part of a round on the device, see `runner/decode_round.py`. `draft`
    and `absorb` never wait for the device: a CUDA graph can hold them."""

    def knows(self, lines: Ints, positions: Ints) -> NDArray[np.bool_]:
        """On the host: whether the state of each line [B] is that of its root [B]; [B] bool."""
        ...

    def draft(
        self, roots: Roots, shape: TreeShape, max_context: int, any_sampled: bool, scratch: Scratch
    ) -> tuple[DraftTree, Tensor]:
        """Trees of `shape`, all nodes of it, without a copy to the host.

        Args:
            roots: on the device. Nodes behind `max_nodes` (0: the row is none) go to `scratch` and
                have parent -1, so that no walk reaches them.
            max_context: no entry lies as far back.
            any_sampled: False promises that all rows are greedy.

        Returns:
            the trees, and which rows have a sound state, [B] bool; others keep their root only.
        """
        ...

    def absorb(self, accepted: Accepted, max_context: int) -> None:
        """Take in what the round committed; the tap has seen its forward."""
        ...

    def absorbed(self, lines: Ints, positions: Ints) -> None:
        """On the host, afterwards: the position of each line's newest entry."""
        ...

    def count_faults(self, count: int) -> None:
        """Rows whose state was not sound, and wanted a tree."""
        ...


class RootProposer:
    """Plain decoding: the tree is its root."""

    lookahead = 0
    tap: FeatureTap | None = None
    num_faults = 0
    failed = False

    def settle(self) -> None:
        """Nothing is put off."""

    def admit(self, line: int) -> None:
        """No state, nothing stale."""

    def propose(self, roots: Roots, shape: TreeShape) -> DraftTree:  # noqa: ARG002  (no choice)
        return DraftTree.roots(roots.tokens)

    def extend(self, committed: Committed, hidden: Tensor) -> None:
        """Nothing to learn: a root needs no draft state."""

    def knows(self, lines: Ints, positions: Ints) -> NDArray[np.bool_]:  # noqa: ARG002
        return np.zeros(len(lines), dtype=np.bool_)

    def draft(
        self,
        roots: Roots,
        shape: TreeShape,  # noqa: ARG002  (no choice)
        max_context: int,  # noqa: ARG002
        any_sampled: bool,  # noqa: ARG002
        scratch: Scratch,  # noqa: ARG002
    ) -> tuple[DraftTree, Tensor]:
        return DraftTree.roots(roots.tokens), torch.ones_like(roots.tokens, dtype=torch.bool)

    def absorb(self, accepted: Accepted, max_context: int) -> None:
        """Nothing to learn."""

    def absorbed(self, lines: Ints, positions: Ints) -> None:
        """Nothing was."""

    def count_faults(self, count: int) -> None:
        """No head, no faults."""
