"""Pending tokens of several steps merge into those of one step that commits them all."""

from __future__ import annotations

from dataclasses import replace

import torch

from drafter.pending import Features, Part, Pending, joined
from engine.speculation.proposer import Committed, Singles


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


def part(*rows: tuple[int, int, int], width: int = 1) -> Part:
    made = committed(*rows, width=width)
    return Part(made, (made.tokens[:, None] * 1.0, made.tokens[:, None] * 2.0))


def added(*parts: Part, most: int = 9) -> Pending:
    pending = Pending(most, 16)
    for one in parts:
        pending.add(one)
    return pending


def assert_same(found: Part | None, whole: Committed) -> None:
    assert found is not None
    for name in ("lines", "cu", "tokens", "positions", "slots"):
        assert torch.equal(getattr(found.committed, name), getattr(whole, name)), name
    assert found.committed.max_entries == whole.max_entries
    assert found.committed.max_context >= whole.max_context
    assert found.committed.exact
    assert torch.equal(found.features[0][:, 0], whole.tokens * 1.0)
    assert torch.equal(found.features[1][:, 0], whole.tokens * 2.0)


def test_steps_come_out_as_one() -> None:
    pending = added(
        part((5, 7, 1), (2, 0, 0), (3, 20, 2)),
        part((3, 22, 1), (5, 8, 1), width=3),
        part((2, 4, 1)),
    )
    found = pending.take([2, 3, 5])
    assert_same(found, committed((2, 4, 1), (3, 20, 3), (5, 7, 2), width=3))
    assert found is not None
    tables = found.committed.block_tables
    assert tables[0, 0] == 20
    assert tables[1:].tolist() == [[30, 31, 32], [50, 51, 52]]  # the newest ones
    assert pending.take([2, 3, 5]) is None


def test_rows_come_out_alone_and_others_stay() -> None:
    pending = added(part((5, 7, 1), (3, 20, 2)), part((3, 22, 1), (5, 8, 1)))
    assert_same(pending.take([3, 9]), committed((3, 20, 3)))
    assert pending.take([3]) is None
    pending.add(part((3, 23, 1), (5, 9, 1)))
    assert_same(pending.take([3]), committed((3, 23, 1)))
    assert_same(pending.take([5]), committed((5, 7, 3)))


def test_only_the_newest_steps_are_kept() -> None:
    pending = added(part((5, 7, 1)), part((5, 8, 1), (3, 1, 1)), part((5, 9, 1)), most=2)
    assert not pending.is_whole(5)
    assert pending.is_whole(3)
    assert not pending.is_whole(4)
    assert_same(pending.take([5]), committed((5, 8, 2)))
    pending.drop([3])
    assert pending.take([3]) is None


def test_the_newest_tokens_of_some_rows() -> None:
    whole = part((5, 7, 4), (2, 0, 0), (3, 20, 2), (6, 1, 1))
    some = whole.rows(torch.tensor([True, True, True, False]), newest=3)
    assert_same(some, committed((5, 8, 3), (3, 20, 2)))


def test_a_row_whose_blocks_were_exchanged_has_those_that_it_was_given_last() -> None:
    """Blocks of rejected nodes may have gone to another row."""
    first, second = part((5, 7, 1), (3, 20, 1), width=3), part((5, 8, 1), width=3)
    tables = second.committed.block_tables + 100
    second = replace(second, committed=replace(second.committed, block_tables=tables))
    found = added(first, second).take([3, 5])
    assert found is not None
    assert found.committed.lines.tolist() == [3, 5]
    assert found.committed.block_tables.tolist() == [[30, 31, 32], [150, 151, 152]]


def singles(*rows: tuple[int, int], end: int = 99, width: int = 2) -> tuple[Singles, Features]:
    """Rows of (line, position)."""
    lines, positions = torch.tensor(rows).T
    tables = lines[:, None].int() * 10 + torch.arange(width, dtype=torch.int32)
    made = Singles(lines, 1000 * lines + positions, positions, torch.full_like(lines, end), tables)
    return made, (made.tokens[:, None] * 1.0,)


def test_single_tokens_of_several_steps_are_joined() -> None:
    found = joined([singles((5, 14), (3, 4)), singles((5, 15)), singles((5, 16), (3, 5))], 16)
    assert found is not None
    made = found.committed
    assert made.lines.tolist() == [3, 5]
    assert made.cu.tolist() == [0, 2, 5]
    assert made.positions.tolist() == [4, 5, 14, 15, 16]
    assert made.tokens.tolist() == [3004, 3005, 5014, 5015, 5016]
    assert made.slots.tolist() == [30 * 16 + 4, 30 * 16 + 5, 50 * 16 + 14, 50 * 16 + 15, 51 * 16]
    assert found.features[0][:, 0].tolist() == made.tokens.tolist()
    assert (made.max_entries, made.max_context) == (3, 17)


def test_single_tokens_without_a_slot_are_left_out() -> None:
    found = joined([singles((5, 14), (3, 16), end=16)], 16)
    assert found is not None
    assert found.committed.lines.tolist() == [5]
    assert joined([singles((5, 14), end=14)], 16) is None


def test_of_steps_that_are_repeated_the_last_counts() -> None:
    found = joined([singles((5, 6)), singles((5, 7)), singles((5, 6), (3, 8)), singles((3, 9))], 16)
    assert found is not None
    assert found.committed.cu.tolist() == [0, 2, 3]
    assert found.committed.positions.tolist() == [8, 9, 6]
