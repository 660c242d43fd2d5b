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


def test_before_any_tree_the_prior_counts_and_nothing_deeper_is_expected() -> None:
    assert Acceptance().reach(0, chain(2), sampled=False) == [PRIOR[0], 0.0]
    wide = Acceptance().reach(0, WIDE, sampled=False)
    assert wide == pytest.approx(PRIOR[:3])


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


def test_a_depth_that_was_never_tried_is_expected_to_be_like_the_one_above_it() -> None:
    acceptance = Acceptance()
    play(acceptance, 0, (0.9,), 100)
    one, two = acceptance.reach(1, chain(2), sampled=False)
    assert two == pytest.approx(one * one, rel=0.1)


def test_one_may_hope_the_more_the_less_is_known() -> None:
    acceptance = Acceptance()
    for line in range(10):
        play(acceptance, line, (0.3,), 20)
    (likely,) = acceptance.reach(0, chain(1), sampled=False)
    (known,) = acceptance.reach(0, chain(1), sampled=False, hope=1.0)
    (hoped,) = acceptance.reach(99, chain(1), sampled=False, hope=1.0)
    assert likely < known < hoped < 0.7
    for _ in range(1000):
        acceptance.fade()
    (faded,) = acceptance.reach(0, chain(1), sampled=False, hope=1.0)
    assert faded > hoped, "what failed long ago is tried again"


def test_a_line_with_a_new_sequence_is_unknown() -> None:
    acceptance = Acceptance()
    play(acceptance, 0, (0.0,), 20)
    acceptance.forget(0)
    assert acceptance.reach(0, chain(1), sampled=False) == acceptance.reach(
        7, chain(1), sampled=False
    )


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
    assert two == pytest.approx(one * one, rel=0.1), "as the depth above"
