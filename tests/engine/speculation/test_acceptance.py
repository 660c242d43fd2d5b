"""How likely draft tokens are said to be accepted, after trees of known chances."""

from __future__ import annotations

import random

import pytest

from engine.speculation.acceptance import PRIOR, Acceptance
from engine.step.shape import StaticShape, chain

WIDE = StaticShape("wide", (-1, 0, 0, 0))


LUCK = random.Random(0)


@pytest.fixture(autouse=True)
def same_luck() -> None:
    LUCK.seed(0)


def play(acceptance: Acceptance, line: int, chances: tuple[float, ...], trees: int) -> None:
    """Chains of greedy requests, each node accepted with the chance of its depth."""
    shape = chain(len(chances))
    for _ in range(trees):
        path: list[int] = []
        while len(path) < len(chances) and LUCK.random() < chances[len(path)]:
            path.append(len(path) + 1)
        acceptance.observe(line, shape, shape.num_nodes, path, sampled=False)


def test_before_any_tree_the_prior_counts() -> None:
    (chance,) = Acceptance().reach(0, chain(1), sampled=False)
    assert sum(PRIOR) > chance > PRIOR[0]


def test_each_depth_has_its_own_chance() -> None:
    acceptance, chances = Acceptance(), (0.9, 0.6, 0.3)
    for line in range(20):
        play(acceptance, line, chances, 100)
    reach = acceptance.reach(99, chain(3), sampled=False)
    assert reach == pytest.approx([0.9, 0.54, 0.162], abs=0.15)


def test_each_row_has_its_own_chance_and_greedy_and_sampled_ones_differ() -> None:
    acceptance = Acceptance()
    for _ in range(10):
        play(acceptance, 0, (0.9,), 20)
        play(acceptance, 1, (0.05,), 20)
    (good,) = acceptance.reach(0, chain(1), sampled=False)
    (bad,) = acceptance.reach(1, chain(1), sampled=False)
    assert good > 0.7
    assert bad < 0.25
    assert acceptance.reach(2, chain(1), sampled=True) == Acceptance().reach(
        2, chain(1), sampled=True
    )


def test_a_new_row_counts_as_one_of_the_better_ones_until_it_is_known() -> None:
    acceptance = Acceptance()
    for turn in range(20):
        play(acceptance, turn % 8, (0.95 if turn % 2 else 0.05,), 20)
    (hoped,) = acceptance.reach(99, chain(1), sampled=False)
    assert hoped > 0.6
    play(acceptance, 99, (0.0,), 4)
    (known,) = acceptance.reach(99, chain(1), sampled=False)
    assert known < 0.35
    acceptance.forget(99)
    assert acceptance.reach(99, chain(1), sampled=False)[0] > known


def test_each_rank_has_its_own_chance() -> None:
    acceptance = Acceptance()
    for step in range(2000):
        acceptance.observe(0, WIDE, 4, (2,) if step % 2 else (), sampled=False)
    first, second, third = acceptance.reach(0, WIDE, sampled=False)
    assert first < 0.02
    assert second == pytest.approx(0.5, abs=0.15)
    assert third < 0.02


def test_a_cut_tree_says_nothing_about_nodes_that_it_lacked() -> None:
    acceptance = Acceptance()
    for _ in range(100):
        acceptance.observe(0, chain(3), 2, (1,), sampled=False)
    one, two, _ = acceptance.reach(0, chain(3), sampled=False)
    assert one > 0.9
    assert two == pytest.approx(one * Acceptance().reach(1, chain(1), sampled=False)[0], rel=0.05)
