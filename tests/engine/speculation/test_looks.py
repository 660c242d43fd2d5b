"""How often plain steps look up drafts."""

from __future__ import annotations

from itertools import pairwise

import pytest

from engine.speculation.looks import Looks
from engine.step.plan import RowOutcome, StepOutcome, StepPlan
from tests.support.engines.plans import decoding


def step(looks: Looks, num_rows: int, path: tuple[int, ...] = ()) -> bool:
    """Whether a plain step looked. The last row then has a draft if `path` of it is accepted."""
    has_looked = looks.is_due()
    found = path if has_looked else ()
    draft = (5, 6) if found else ()
    rows = [decoding(line) for line in range(num_rows - 1)] + [decoding(num_rows, 2, draft)]
    outcomes = [RowOutcome((1,), 0) for _ in rows[:-1]]
    outcomes.append(RowOutcome((1,) * (1 + len(found)), len(draft), found))
    looks.observe(StepPlan(rows=tuple(rows)), StepOutcome(tuple(outcomes)))
    return has_looked


@pytest.mark.parametrize(("num_rows", "pause"), [(1, 0), (2, 1), (8, 4), (16, 8), (200, 12)])
def test_looks_that_bring_nothing_become_rarer_the_more_rows_there_are(
    num_rows: int, pause: int
) -> None:
    looks = Looks()
    looked = [at for at in range(200) if step(looks, num_rows)]
    assert looked[0] == 0
    assert {after - before for before, after in pairwise(looked[-5:])} == {pause + 1}


def test_a_token_that_was_accepted_brings_them_back() -> None:
    looks = Looks()
    for _ in range(60):
        step(looks, 16)
    while not step(looks, 16, path=(1, 2)):
        pass
    assert [step(looks, 16, path=(1,)) for _ in range(5)] == [True] * 5
    assert [step(looks, 16) for _ in range(4)] == [True, False, True, False]
