"""What `Ops.start_rows` takes and gives."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class LineRows:
    """B rows whose only own token is their root, the state of all L lines, and the changes of their
    block tables, each of a line that has a row, or of the last line. Padding rows have the last
    line, whose table is scratch, and limit 0."""

    lines: Tensor  # [B] int64
    follows: Tensor  # [B] bool: the root is the newest token of the line
    own_tokens: Tensor  # [B] int64, the other roots
    own_starts: Tensor  # [B] int64, their positions
    lens: Tensor  # [B] int64, own tokens: 1, or 0 for padding rows
    limits: Tensor  # [B] int64 nodes, the root included
    num_known: Tensor  # [B] int64, nodes of drafts that are known
    places: Tensor  # [U] int64, in the flat tables of all lines
    blocks: Tensor  # [U] int32
    line_tokens: Tensor  # [L] int64, the newest token of each line
    line_positions: Tensor  # [L] int64, its position
    line_tables: Tensor  # [L, columns] int32, changed in place


@dataclass(frozen=True, slots=True)
class StartedRows:
    """The roots of all rows."""

    tables: Tensor  # [B, columns] int32, after the changes
    tokens: Tensor  # [B] int64
    starts: Tensor  # [B] int64, position of the root
    positions: Tensor  # [B] int64, the same; at least 0 for padding rows
    max_nodes: Tensor  # [B] int64 that a head may draft, the root included: 1 if a draft is known
