"""If the proposer changes while rows run, the next plan already follows its needs."""

from __future__ import annotations

import pytest

from engine.step.shape import ROOT, chain
from tests.support.engines.fake_executor import FakeEngine, prompt_of, request


def test_rows_that_run_get_the_slot_that_a_new_proposer_needs() -> None:
    fake = FakeEngine(num_blocks=8, block_size=4)
    fake.submit(request("a", prompt_of(4), max_tokens=20))
    (row,) = fake.step().rows
    assert row.num_blocks == 1
    fake.scheduler.draft_with(1, None)
    (row,) = fake.step().rows  # its one token at position 4, and an entry for the next
    assert row.num_blocks * 4 >= row.start + 2
    for _ in range(6):
        (row,) = fake.step().rows
        assert row.num_blocks * 4 >= row.start + 2
    fake.scheduler.draft_with(0, None)
    fake.run()


@pytest.mark.parametrize(("lookahead", "again"), [(0, 0), (1, 1)])
def test_prefix_hits_leave_what_the_newest_proposer_has_to_see(lookahead: int, again: int) -> None:
    fake = FakeEngine(lookahead=1, shapes=(ROOT, chain(3)))
    fake.submit(request("first", prompt_of(17), max_tokens=2))
    fake.run()
    fake.scheduler.draft_with(1 - lookahead, None)
    fake.scheduler.draft_with(lookahead, None)
    fake.submit(request("second", prompt_of(17), max_tokens=2))
    (row,) = fake.step().rows
    assert row.start == 16 - again
