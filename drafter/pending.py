"""Committed tokens that a draft head has not processed yet. The host reads their values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.speculation.proposer import Committed

Features = tuple[Tensor, ...]  # one [C, H target] per tapped layer


@dataclass(slots=True)
class Pending:
    """Tokens of the running rows over several steps, each with the target's features."""

    num_tokens: int = 0
    _parts: list[Committed] = field(default_factory=list)
    _features: list[Features] = field(default_factory=list)
    _ends: dict[int, int] = field(default_factory=dict)  # line -> position after its newest token

    def add(self, committed: Committed, features: Features) -> None:
        """Keep tokens and their features [C, H]. They must follow the tokens kept before."""
        assert self.followed_by(committed)
        self._parts.append(committed)
        self._features.append(features)
        self.num_tokens += len(committed.tokens)
        self._ends |= {line: end for line, _, end in _spans(committed)}

    def followed_by(self, committed: Committed) -> bool:
        """Whether every row continues where its pending tokens end."""
        return all(self._ends.get(line, start) == start for line, start, _ in _spans(committed))

    def merge(self) -> tuple[Committed, Features]:
        """All pending tokens, one span per row that has any, and all features [C, H] in order of
        arrival; `features` of the tokens are indices into these."""
        by_layer = zip(*self._features, strict=True)
        return _merge(self._parts), tuple(torch.cat(seen) for seen in by_layer)


def _spans(committed: Committed) -> list[tuple[int, int, int]]:
    """Line, first position and end position of every row that has tokens."""
    cu, positions = committed.cu.tolist(), committed.positions.tolist()
    spans = zip(committed.lines.tolist(), cu[:-1], cu[1:], strict=True)
    return [(line, positions[a], positions[b - 1] + 1) for line, a, b in spans if b > a]


def _merge(parts: Sequence[Committed]) -> Committed:
    """Merge the parts, without empty rows. `features` numbers the tokens of all parts in order."""
    line_of = torch.cat([part.lines.repeat_interleave(part.cu.diff()) for part in parts])
    order = line_of.argsort(stable=True)
    counts = line_of.bincount()
    lines = counts.nonzero()[:, 0]
    return Committed(
        lines=lines,
        cu=torch.cat((counts.new_zeros(1), counts[lines].cumsum(0))),
        features=order,
        tokens=torch.cat([part.tokens for part in parts])[order],
        positions=torch.cat([part.positions for part in parts])[order],
        slots=torch.cat([part.slots for part in parts])[order],
        block_tables=_newest_tables(parts, lines),
        max_entries=int(counts.max()),
        max_context=max(part.max_context for part in parts),
        exact=True,
    )


def _newest_tables(parts: Sequence[Committed], lines: Tensor) -> Tensor:
    """The most recent block tables of `lines` [B]."""
    width = max(part.block_tables.shape[1] for part in parts)
    known = parts[0].block_tables.new_zeros(max(int(part.lines.max()) for part in parts) + 1, width)
    for part in parts:
        known[part.lines, : part.block_tables.shape[1]] = part.block_tables
    return known[lines]
