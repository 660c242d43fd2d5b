"""What the operations between the forwards of a draft head take and give."""

from __future__ import annotations

from dataclasses import dataclass, fields

from torch import Tensor


@dataclass(frozen=True, slots=True)
class RootStates:
    """The roots of B rows, and what a proposer keeps of L lines."""

    lines: Tensor  # [B] int64
    positions: Tensor  # [B] int64
    max_nodes: Tensor  # [B] int64 nodes of the tree; 1: no draft, 0: a padding row
    states: Tensor  # [L, H]
    state_positions: Tensor  # [L] int64, of the token that each state belongs to
    firsts: Tensor  # [L] int32, the first entry that may be attended to
    num_drafted: int  # slots that a row needs for the nodes that are drafted
    window: int | None  # number of newest entries that are attended to; None: all


@dataclass(frozen=True, slots=True)
class ReadyRoots:
    """The rows of which a tree may grow."""

    states: Tensor  # [B, H]
    ready: Tensor  # [B] bool: a draft is wanted, and the root's state is there and finite
    faults: Tensor  # [B] bool: it is there, but not finite
    num_slots: Tensor  # [B] int64 slots for drafted nodes, the root's included
    first_keys: Tensor  # [B] int32, at most the root's position
    sizes: Tensor  # [B] int64 nodes that the tree may keep

    def rows(self, which: Tensor) -> ReadyRoots:
        """A selection of the rows."""
        return ReadyRoots(*(getattr(self, part.name)[which] for part in fields(self)))


@dataclass(frozen=True, slots=True)
class LevelNodes:
    """The M nodes of a tree that go through a draft head after its root, level after level."""

    nodes: Tensor  # [M] int64 their numbers, and so are the rest
    depths: Tensor
    masks: Tensor  # bit masks over nodes
    firsts: Tensor  # index of the first node of the same level
    widths: Tensor  # nodes of the same level


@dataclass(frozen=True, slots=True)
class RowPlaces:
    """Where the nodes of B rows may lie. Node i belongs i places after the root."""

    positions: Tensor  # [B] int64 of the roots
    num_slots: Tensor  # [B] int64, the root's included
    tables: Tensor  # [B, columns] int32
    block_size: int
    first_scratch: int  # slot
    max_len: int  # positions of one sequence


@dataclass(frozen=True, slots=True)
class LaidNodes:
    """The nodes of B rows, level after level, in each row after row. A level begins at an even
    index, so that its addresses are as aligned as Triton likes them."""

    prefix_lens: Tensor  # [B] int32
    positions: Tensor  # int64, below max_len
    slots: Tensor  # int64, scratch for nodes without a slot
    masks: Tensor  # int64, 1 for nodes without a slot: they see only the root

    def level(self, first: int, width: int) -> LaidNodes:
        """The level of `width` nodes that begins at node `first`."""
        begin = first * evenly(len(self.prefix_lens))
        some = slice(begin, begin + width * len(self.prefix_lens))
        return LaidNodes(self.prefix_lens, self.positions[some], self.slots[some], self.masks[some])


@dataclass(frozen=True, slots=True)
class HeadInput:
    """What C entries give to an EAGLE-3 head besides their embedding."""

    token_ids: Tensor  # [C] int64
    features: Tensor  # [*, H]
    feature_of: Tensor | None  # [C] int64, the row of each entry's feature; None: its own
    embedding_norm: Tensor  # [H] float32
    embedding_eps: float
    feature_norm: Tensor  # [H] float32
    feature_eps: float
    normed_residual: bool  # whether the residual stream begins with the normalised feature


@dataclass(frozen=True, slots=True)
class Candidates:
    """All nodes that a dynamic tree of B rows may keep, level by level, parents before children."""

    tokens: Tensor  # [B, C] int64
    parents: Tensor  # [B, C] int64 index of each one's parent, -1 for the root
    scores: Tensor  # [B, C] float32 cumulative log-probabilities


@dataclass(frozen=True, slots=True)
class Frontier:
    """The K nodes of each of B rows that get children."""

    tokens: Tensor  # [B, K] int64
    scores: Tensor  # [B, K] float32 cumulative log-probabilities
    masks: Tensor  # [B, K] int64 ancestor masks, own bit included
    places: Tensor  # [B, K] int64 index among the candidates
    feature_of: Tensor  # [B * K] int64 index of the parent among the frontier before, of all rows


def evenly(num_rows: int) -> int:
    """Rows for which a level has room."""
    return num_rows + num_rows % 2
