"""Committed tokens that a draft head has not taken yet. The host reads their values."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from engine.speculation.proposer import Committed, Singles

Features = tuple[Tensor, ...]  # one [C, H target] per tapped layer


@dataclass(frozen=True, slots=True)
class Part:
    """Tokens of one step, with the features [C, H] of each in the same order."""

    committed: Committed
    features: Features

    def rows(self, keep: Tensor, newest: int | None = None) -> Part:
        """The rows that `keep` [B] names, and no more than the `newest` tokens of each."""
        if newest is None and bool(keep.all()):
            return self
        committed = self.committed
        counts = committed.cu.diff()
        kept = torch.where(keep, counts if newest is None else counts.clamp(max=newest), 0)
        row = torch.arange(len(counts)).repeat_interleave(counts)
        chosen = torch.arange(len(row)) >= (committed.cu[1:] - kept)[row]
        chosen_rows = kept > 0
        return Part(
            replace(
                committed,
                lines=committed.lines[chosen_rows],
                cu=_starts(kept[chosen_rows]),
                features=torch.arange(int(kept.sum())),
                tokens=committed.tokens[chosen],
                positions=committed.positions[chosen],
                slots=committed.slots[chosen],
                block_tables=committed.block_tables[chosen_rows],
                max_entries=int(kept.max()) if len(kept) else 0,
                packed=None,  # it is of all rows
            ),
            tuple(seen[chosen] for seen in self.features),
        )


@dataclass(slots=True)
class Pending:
    """The newest tokens of running rows: at least those of the last `most` steps."""

    most: int
    block_size: int
    _singles: list[tuple[Singles, Features]] = field(default_factory=list)  # after `_parts`
    _parts: deque[tuple[Part, int]] = field(default_factory=deque)  # with the number of its steps
    _num_steps: int = 0  # of `_parts`
    _num_dropped: int = 0  # parts before `_parts`
    _oldest: dict[int, int] = field(default_factory=dict)  # line -> its first part that counts

    @property
    def lines(self) -> Collection[int]:
        """The rows that have tokens, apart from the single ones."""
        return self._oldest.keys()

    def is_whole(self, line: int) -> bool:
        """Whether a row has tokens, and all since it had none."""
        return self._oldest.get(line, -1) >= self._num_dropped

    def add_singles(self, singles: Singles, features: Features) -> None:
        """Keep the tokens of a step as they are; `join` them after `most` steps."""
        self._singles.append((singles, features))

    @property
    def num_singles(self) -> int:
        return len(self._singles)

    def join(self) -> Part | None:
        """The tokens of the steps with single ones, which are not kept any more."""
        singles, self._singles = self._singles, []
        return joined(singles, self.block_size) if singles else None

    def add(self, part: Part, num_steps: int = 1) -> None:
        """Keep the tokens of some steps; they follow those kept before."""
        number = self._num_dropped + len(self._parts)
        for line in part.committed.lines.tolist():
            self._oldest.setdefault(line, number)
        self._parts.append((part, num_steps))
        self._num_steps += num_steps
        while self._num_steps - self._parts[0][1] >= self.most:
            self._num_steps -= self._parts.popleft()[1]
            self._num_dropped += 1

    def drop(self, lines: Iterable[int]) -> None:
        """Forget the tokens of these rows."""
        for line in lines:
            self._oldest.pop(line, None)
        if not self._oldest:
            self._num_dropped += len(self._parts)
            self._num_steps = 0
            self._parts.clear()

    def take(self, lines: Iterable[int]) -> Part | None:
        """Remove and return the tokens of these rows; None if there are none."""
        wanted = {line: self._oldest[line] for line in lines if line in self._oldest}
        parts = []
        for number, (part, _) in enumerate(self._parts, start=self._num_dropped):
            own = part.committed.lines.tolist()
            keep = [line in wanted and wanted[line] <= number for line in own]
            if any(keep):
                parts.append(part.rows(torch.tensor(keep)))
        self.drop(wanted)
        return _merge(parts) if parts else None


def joined(singles: Sequence[tuple[Singles, Features]], block_size: int) -> Part | None:
    """One span of tokens per row; None if no token has a slot."""
    steps = [step for step, _ in singles]
    line_of = torch.cat([step.lines for step in steps])
    positions = torch.cat([step.positions for step in steps])
    has_slot = positions < torch.cat([step.ends for step in steps])
    order = line_of.argsort(stable=True)
    order = order[has_slot[order]]
    # A step that is repeated to measure it goes back: only what follows the last one counts.
    offset = positions[order] - torch.arange(len(order))
    last = offset[line_of[order].bincount().cumsum(0)[line_of[order]] - 1]
    order = order[offset == last]
    counts = line_of[order].bincount()
    lines = counts.nonzero()[:, 0]
    if len(lines) == 0:
        return None
    tables, positions = _newest_tables(steps, lines), positions[order]
    row = torch.arange(len(lines)).repeat_interleave(counts[lines])
    blocks = tables[row, positions // block_size].long()
    committed = Committed(
        lines=lines,
        cu=_starts(counts[lines]),
        features=torch.arange(len(order)),
        tokens=torch.cat([step.tokens for step in steps])[order],
        positions=positions,
        slots=blocks * block_size + positions % block_size,
        block_tables=tables,
        max_entries=int(counts.max()),
        max_context=int(positions.max()) + 1,
        exact=True,
    )
    by_layer = zip(*(features for _, features in singles), strict=True)
    return Part(committed, tuple(torch.cat(seen)[order] for seen in by_layer))


def _merge(parts: list[Part]) -> Part:
    """One span of tokens per row."""
    if len(parts) == 1:
        return parts[0]
    steps = [part.committed for part in parts]
    line_of = torch.cat([step.lines.repeat_interleave(step.cu.diff()) for step in steps])
    order = line_of.argsort(stable=True)
    counts = line_of.bincount()
    lines = counts.nonzero()[:, 0]
    committed = Committed(
        lines=lines,
        cu=_starts(counts[lines]),
        features=torch.arange(len(order)),
        tokens=torch.cat([step.tokens for step in steps])[order],
        positions=torch.cat([step.positions for step in steps])[order],
        slots=torch.cat([step.slots for step in steps])[order],
        block_tables=_newest_tables(steps, lines),
        max_entries=int(counts.max()),
        max_context=max(step.max_context for step in steps),
        exact=True,
    )
    by_layer = zip(*(part.features for part in parts), strict=True)
    return Part(committed, tuple(torch.cat(seen)[order] for seen in by_layer))


def _starts(counts: Tensor) -> Tensor:
    """The first token of each row, and the end of the last, [B + 1]."""
    return torch.cat((counts.new_zeros(1), counts.cumsum(0)))


def _newest_tables(steps: Sequence[Committed | Singles], lines: Tensor) -> Tensor:
    """The most recent block tables of `lines` [B]."""
    width = max(step.block_tables.shape[1] for step in steps)
    known = steps[0].block_tables.new_zeros(int(lines.max()) + 1, width)
    for step in steps:
        some = step.lines < len(known)
        known[step.lines[some], : step.block_tables.shape[1]] = step.block_tables[some]
    return known[lines]
