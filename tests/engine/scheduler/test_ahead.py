"""What a step that is planned ahead provides for, whatever the step in flight brings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from engine.kv.manager import KVManager
from engine.scheduler.limits import SchedulerLimits
from engine.scheduler.scheduler import Scheduler
from engine.speculation.lookup import Found
from engine.speculation.planner import Choice
from engine.step.plan import UNKNOWN, RowOutcome, StepOutcome, StepPlan
from engine.step.shape import ROOT, DynamicShape, StaticShape, TreeShape, chain
from tests.support.engines.in_process import ask

BLOCK, MAX_LEN = 4, 40
BUSH = StaticShape("bush", (-1, 0, 0, 0, 1, 1, 2))
DYNAMIC = DynamicShape("dynamic", 5, 3, 4)  # 9 nodes go through the head


@dataclass
class Known:
    """A lookup that finds what the test says."""

    chain: list[int] = field(default_factory=list)

    def draft(self, seq: Any, most: int, price: float, rival: float, *, may_try: bool) -> Found:
        return Found(tuple(self.chain[: max(0, most)]), 1.0)

    def observe(self, plan: StepPlan, outcome: StepOutcome) -> None: ...

    def forget(self, line: int) -> None: ...


def running(
    *, max_tokens: int = 99, prompt: int = 6, lookahead: int = 1, found: list[int] | None = None
) -> Scheduler:
    """A request whose prompt is computed, and that has one token."""
    scheduler = Scheduler(
        SchedulerLimits(2, 64, MAX_LEN), KVManager(32, BLOCK, True), frozenset(), vocab_size=100
    )
    lookup: Any = None if found is None else Known(found)
    scheduler.draft_with(lookahead, lookup)
    scheduler.submit(ask("a", [5] * prompt, max_tokens=max_tokens))
    scheduler.update(scheduler.schedule(), StepOutcome((RowOutcome((7,)),)))
    return scheduler


def two_steps(
    scheduler: Scheduler, before: TreeShape, following: TreeShape
) -> tuple[StepPlan, StepPlan | None]:
    plan = scheduler.schedule(Choice(before))
    return plan, scheduler.schedule_ahead(plan, lambda _: Choice(following))


SHAPES = [ROOT, chain(5), BUSH, DYNAMIC]


@pytest.mark.parametrize("lookahead", [0, 1])
@pytest.mark.parametrize("following", SHAPES, ids=lambda shape: shape.name)
@pytest.mark.parametrize("before", SHAPES, ids=lambda shape: shape.name)
@pytest.mark.parametrize("known", [0, 7])
@pytest.mark.parametrize("prompt", range(4, 8))
def test_there_are_slots_for_the_most_that_may_be_accepted(
    before: TreeShape, following: TreeShape, known: int, prompt: int, lookahead: int
) -> None:
    scheduler = running(prompt=prompt, lookahead=lookahead, found=[5] * known if known else None)
    plan, ahead = two_steps(scheduler, before, following)
    (row,) = plan.rows
    assert len(row.draft) == known
    assert ahead is not None
    (after,) = ahead.rows
    assert (after.start, after.token_ids) == (row.start + 1, (UNKNOWN,))
    assert not after.draft
    depth = known or min(row.num_draft, 3 if before is DYNAMIC else before.max_depth)
    own = following.slots_for(1 + after.num_draft) if after.num_draft else 1
    last_root = row.start + 1 + depth
    assert after.num_blocks * BLOCK >= last_root + own + lookahead
    assert after.first_block == row.num_blocks
    assert len({*row.new_blocks, *after.new_blocks}) == len(row.new_blocks + after.new_blocks)
    assert after.num_draft == following.num_nodes - 1


@pytest.mark.parametrize(("max_tokens", "continues"), [(2, False), (3, True)])
def test_a_row_that_ends_with_its_very_next_token_is_not_computed_once_more(
    max_tokens: int, continues: bool
) -> None:
    _, ahead = two_steps(running(max_tokens=max_tokens), ROOT, ROOT)
    assert (ahead is not None) == continues


@pytest.mark.parametrize(("prompt", "continues"), [(MAX_LEN - 2, False), (MAX_LEN - 3, True)])
def test_a_row_whose_next_token_is_the_last_of_its_context_is_not_computed_once_more(
    prompt: int, continues: bool
) -> None:
    _, ahead = two_steps(running(prompt=prompt), ROOT, ROOT)
    assert (ahead is not None) == continues


@pytest.mark.parametrize(("max_tokens", "num_draft"), [(3, 0), (4, 2)])
def test_no_nodes_where_the_bonus_token_is_all_that_will_be_missing(
    max_tokens: int, num_draft: int
) -> None:
    _, ahead = two_steps(running(max_tokens=max_tokens), ROOT, chain(2))
    assert ahead is not None
    assert ahead.rows[0].num_draft == num_draft


@pytest.mark.parametrize("before", [ROOT, chain(3)], ids=lambda shape: shape.name)
@pytest.mark.parametrize("left", range(3, 12))
def test_nodes_and_the_bonus_token_stay_within_the_context_whatever_is_accepted(
    before: TreeShape, left: int
) -> None:
    scheduler = running(prompt=MAX_LEN - 1 - left)
    plan, ahead = two_steps(scheduler, before, chain(4))
    assert ahead is not None
    newest = MAX_LEN - left - 1  # position of the root of the step in flight
    last_root = newest + 1 + min(plan.rows[0].num_draft, before.max_depth)
    most = max(0, MAX_LEN - 1 - last_root - 1)
    assert ahead.rows[0].num_draft == min(4, most)
