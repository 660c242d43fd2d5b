"""Which tree the planner chooses for known costs and acceptance."""

from __future__ import annotations

import random

import pytest

from engine.speculation.planner import PRIOR, Acceptance, AdaptivePlanner, FixedPlanner, StepCosts
from engine.step.plan import RowOutcome, StepOutcome, StepPlan
from engine.step.shape import ROOT, StaticShape, TreeShape, chain
from tests.support.plans import decoding

WIDE = StaticShape("wide", (-1, 0, 0, 0))


def costs(**seconds: list[tuple[int, float]]) -> StepCosts:
    return StepCosts(seconds)


def observed(shape: StaticShape, chance: float, trees: int, seed: int = 0) -> StepOutcome:
    """Outcomes of chains whose every node is accepted with `chance`."""
    generator = random.Random(seed)
    rows = []
    for _ in range(trees):
        path = []
        for node in range(1, shape.num_nodes):
            if generator.random() >= chance:
                break
            path.append(node)
        rows.append(RowOutcome((0,) * (len(path) + 1), shape.num_nodes - 1, tuple(path)))
    return StepOutcome(tuple(rows))


def step(planner: AdaptivePlanner, num_draft: int) -> TreeShape:
    """Choose, and report a step in which the row had `num_draft` nodes, none of them accepted."""
    shape = planner.choose(1)
    given = min(num_draft, shape.num_nodes - 1)
    row = decoding(0, given)
    planner.observe(StepPlan(rows=(row,), shape=shape), StepOutcome((RowOutcome((1,), given),)))
    return shape


def teach(planner: AdaptivePlanner, chance: float, trees: int = 400) -> None:
    rows = tuple(decoding(at, 3) for at in range(trees))
    planner.observe(StepPlan(rows=rows, shape=chain(3)), observed(chain(3), chance, trees))


@pytest.mark.parametrize(
    ("rows", "expected"), [(1, 1.0), (2, 1.5), (3, 2.0), (4, 2.5), (5, 2.5), (6, 2.5), (12, 5.0)]
)
def test_costs_lie_on_the_line_between_measurements(rows: int, expected: float) -> None:
    measured = costs(root=[(1, 1.0), (3, 2.0), (4, 2.5), (6, 2.5)])
    assert measured.of(ROOT, rows) == pytest.approx(expected)


@pytest.mark.parametrize("chance", [0.0, 0.3, 0.7, 1.0])
def test_the_estimate_of_a_chain_follows_the_trees(chance: float) -> None:
    acceptance = Acceptance()
    for row in observed(chain(3), chance, 2000).rows:
        acceptance.observe(chain(3), 4, row.path)
    exact = sum(chance**depth for depth in range(4))
    assert acceptance.expected_emitted(chain(3)) == pytest.approx(exact, rel=0.2)


def test_each_rank_has_its_own_chance() -> None:
    acceptance = Acceptance()
    for step in range(2000):
        acceptance.observe(WIDE, 4, (2,) if step % 2 else ())
    chances = [acceptance.chance(rank) for rank in range(3)]
    assert chances[0] < 0.02
    assert chances[1] == pytest.approx(0.5, abs=0.1)
    assert chances[2] < 0.02
    assert acceptance.expected_emitted(WIDE) == pytest.approx(1.5, abs=0.1)


def test_before_any_tree_the_prior_counts() -> None:
    assert Acceptance().expected_emitted(chain(1)) == pytest.approx(1 + PRIOR[0])


CHEAP = {"root": [(1, 1.0), (64, 10.0)], "chain3": [(1, 1.3), (64, 60.0)]}


def test_a_head_that_accepts_is_used_where_it_pays() -> None:
    planner = AdaptivePlanner([chain(3)], costs(**CHEAP))
    teach(planner, 0.8)
    assert planner.choose(1) == chain(3)
    assert planner.choose(64) == ROOT  # a step of 64 rows costs six times as much with trees


def test_a_head_that_never_accepts_is_left_alone_but_probed() -> None:
    planner = AdaptivePlanner([chain(3)], costs(**CHEAP), probe_every=10)
    teach(planner, 0.0)
    chosen = [step(planner, 3) for _ in range(100)]
    assert [at for at, shape in enumerate(chosen) if shape == chain(3)] == list(range(9, 100, 10))
    assert set(chosen) == {ROOT, chain(3)}


def test_a_probe_without_room_for_nodes_stays_due() -> None:
    planner = AdaptivePlanner([chain(3)], costs(**CHEAP), probe_every=10)
    teach(planner, 0.0)
    chosen = [step(planner, 0 if at < 12 else 3) for at in range(23)]
    assert [at for at, shape in enumerate(chosen) if shape == chain(3)] == [9, 10, 11, 12, 22]


def test_a_probe_notices_that_the_traffic_changed() -> None:
    planner = AdaptivePlanner([chain(3)], costs(**CHEAP))
    teach(planner, 0.0)
    assert planner.choose(1) == ROOT
    teach(planner, 0.9)
    assert planner.choose(1) == chain(3)


def test_a_small_advantage_does_not_make_it_switch() -> None:
    even = 1 + 0.5 + 0.25 + 0.125  # tokens per step at acceptance one half
    flat = {"root": [(1, 1.0)], "chain3": [(1, even * 0.99)]}
    planner = AdaptivePlanner([chain(3)], costs(**flat))
    planner._acceptance = Acceptance(seen=1e9, hits=[0.5e9] + [0.0] * 7)
    assert planner.choose(1) == ROOT
    assert FixedPlanner(chain(2)).choose(3) == chain(2)
    assert FixedPlanner(chain(2)).choose(0) == ROOT


def test_without_rows_that_decode_there_is_no_tree() -> None:
    planner = AdaptivePlanner([chain(3)], costs(**CHEAP))
    teach(planner, 0.9)
    assert planner.choose(0) == ROOT
