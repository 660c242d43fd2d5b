"""What `Ops.pack_entries` takes and gives."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

BY_ENTRY = ("features", "tokens", "positions", "slots", "masks")


@dataclass(frozen=True, slots=True)
class Walks:
    """What B rows, whose only own token was their root, emitted along E nodes at most. A padding
    row has no own token."""

    starts: Tensor  # [B] int64, position of the root
    lens: Tensor  # [B] int64, own tokens: 1, or 0 for padding rows
    ends: Tensor  # [B] int64, position after the last one with a slot
    samples: Tensor  # [B] bool
    next_tokens: Tensor  # [B] int64, of rows that do not sample
    path: Tensor  # [B, E] int64 nodes, -1 after the end
    accepted: Tensor  # [B] int64
    emitted: Tensor  # [B, E] int64, -1 after the bonus
    firsts: Tensor  # [B + 1] int64, index of each row's root among the nodes
    tables: Tensor  # [B, columns] int32
    block_size: int
    first_scratch: int  # slot


@dataclass(frozen=True, slots=True)
class PackedEntries:
    """All tokens that follow a node of the paths, row after row. A token without a slot is left
    out. Padding follows, up to B * E; all of it but the slots, which are scratch, is 0."""

    cu: Tensor  # [B + 1] int64, and the same as int32
    cu_q: Tensor
    prefix_lens: Tensor  # [B] int32, position of the row's first token; 0 without one
    last: Tensor  # [B] int64, index of its last token, or of one of another row
    newest: Tensor  # [B] int64, position of its last token, -1 without one
    features: Tensor  # [C] int64, index of the node before the token among the nodes
    tokens: Tensor  # [C] int64
    positions: Tensor  # [C] int64
    slots: Tensor  # [C] int64
    masks: Tensor  # [C] int64 zeros: the entries of a row are causal

    def without_padding(self) -> PackedEntries:
        """Only for hosts that may wait for values."""
        num_used = int(self.cu[-1])
        return replace(self, **{name: getattr(self, name)[:num_used] for name in BY_ENTRY})
