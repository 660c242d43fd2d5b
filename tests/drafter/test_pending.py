"""Pending tokens of several steps merge into those of one step that commits them all."""

from __future__ import annotations

from dataclasses import replace

import torch

from drafter.pending import Pending
from engine.speculation.proposer import Committed


def committed(*rows: tuple[int, int, int], width: int = 1) -> Committed:
    """Rows of (line, first position, count); a token's line and position determine its values."""
    marks = [1000 * line + start + i for line, start, count in rows for i in range(count)]
    at = torch.tensor(marks, dtype=torch.int64)
    counts = torch.tensor([0, *(count for _, _, count in rows)])
    tables = [[10 * line + column for column in range(width)] for line, _, _ in rows]
    return Committed(
        lines=torch.tensor([line for line, _, _ in rows]),
        cu=counts.cumsum(0),
        features=torch.arange(len(marks)),
        tokens=at + 1,
        positions=at % 1000,
        slots=at + 2,
        block_tables=torch.tensor(tables, dtype=torch.int32),
        max_entries=max(count for _, _, count in rows),
        max_context=max(start + count for _, start, count in rows),
        exact=True,
    )


def added(*parts: Committed) -> Pending:
    pending = Pending()
    for part in parts:
        pending.add(part, (part.tokens[:, None] * 1.0, part.tokens[:, None] * 2.0))
    return pending


def test_steps_come_out_as_one() -> None:
    pending = added(
        committed((5, 7, 1), (2, 0, 0), (3, 20, 2)),
        committed((3, 22, 1), (5, 8, 1), width=3),
        committed((2, 4, 1)),
    )
    whole = committed((2, 4, 1), (3, 20, 3), (5, 7, 2), width=3)
    assert pending.num_tokens == 6
    merged, features = pending.merge()
    for name in ("lines", "cu", "tokens", "positions", "slots"):
        assert torch.equal(getattr(merged, name), getattr(whole, name)), name
    assert torch.equal(merged.block_tables[1:], whole.block_tables[1:])  # the newest ones
    assert merged.block_tables[0, 0] == 20
    assert merged.block_tables.dtype == torch.int32
    assert (merged.max_entries, merged.max_context) == (3, 23)
    assert merged.exact
    assert torch.equal(features[0][merged.features, 0], whole.tokens * 1.0)
    assert torch.equal(features[1][merged.features, 0], whole.tokens * 2.0)


def test_a_row_whose_blocks_were_exchanged_has_those_that_it_was_given_last() -> None:
    """Blocks of rejected nodes may have gone to another row."""
    first, second = committed((5, 7, 1), (3, 20, 1), width=3), committed((5, 8, 1), width=3)
    second = replace(second, block_tables=second.block_tables + 100)
    merged, _ = added(first, second).merge()
    assert merged.lines.tolist() == [3, 5]
    assert merged.block_tables.tolist() == [[30, 31, 32], [150, 151, 152]]


def test_a_step_follows_if_its_rows_continue() -> None:
    pending = added(committed((5, 7, 2), (3, 20, 1)))
    assert pending.followed_by(committed((5, 9, 1)))
    assert pending.followed_by(committed((3, 21, 4), (4, 0, 2)))
    assert pending.followed_by(committed((5, 4, 0)))
    assert not pending.followed_by(committed((5, 8, 1)))
    assert not pending.followed_by(committed((5, 10, 1)))
    assert not pending.followed_by(committed((3, 21, 1), (5, 7, 2)))
