"""What `Ops.pack_nodes` takes and gives."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class NodeTrees:
    """The trees of B rows whose only own token is their root, and how each row draws. A padding row
    has limit 0."""

    starts: Tensor  # [B] int64, position of the root
    limits: Tensor  # [B] int64
    sizes: Tensor  # [B] int64 nodes
    tokens: Tensor  # [B, N] int64
    depths: Tensor  # [B, N] int64
    ancestors: Tensor  # [B, N] int64 bit masks over nodes
    tables: Tensor  # [B, columns] int32
    temperatures: Tensor  # [B] float32
    seeds: Tensor  # [B] int64
    top_k: Tensor | None  # [B] int64; None, as the next two: no row has filters
    top_p: Tensor | None  # [B] float32
    min_p: Tensor | None  # [B] float32
    num_nodes: int  # R, at least the sum of the sizes
    block_size: int
    first_scratch: int  # slot
    max_len: int  # positions of one sequence

    @property
    def filters(self) -> dict[str, Tensor | None]:
        return {"top_k": self.top_k, "top_p": self.top_p, "min_p": self.min_p}


@dataclass(frozen=True, slots=True)
class PackedNodes:
    """All nodes, row after row, then padding, whose token and mask are 0, whose slots are scratch,
    and of which the rest is arbitrary."""

    cu: Tensor  # [B + 1] int64, and the same as int32
    cu_q: Tensor
    prefix_lens: Tensor  # [B] int32
    first_keys: Tensor  # [B] int32 zeros
    row_of: Tensor  # [R] int64
    place: Tensor  # [R] int64, node of the row
    used: Tensor  # [R] bool
    tokens: Tensor  # [R] int64
    positions: Tensor  # [R] int64, below max_len
    slots: Tensor  # [R] int64
    ancestors: Tensor  # [R] int64; 0 for a lone root, which needs no mask
    at: Tensor  # [B, N] int64, the place of each node among the R; 0 if it is not `inside`
    inside: Tensor  # [B, N] bool, the row has this node
    temperatures: Tensor  # [R] float32, and so on, by the node's row
    seeds: Tensor
    draw_positions: Tensor  # [R] int64, of the token after each node
    top_k: Tensor | None
    top_p: Tensor | None
    min_p: Tensor | None
