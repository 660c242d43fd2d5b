"""Which rows draft, for known costs and acceptance; and how far that is from the best."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from dataclasses import replace

import pytest

from engine.speculation.account import Account
from engine.speculation.costs import Padding, Sample, StepCosts, Work
from engine.speculation.planner import (
    AdaptivePlanner,
    Candidate,
    Choice,
    FixedPlanner,
    entry_price,
    node_price,
)
from engine.step.plan import RowOutcome, StepOutcome, StepPlan
from engine.step.shape import ROOT, chain
from tests.support.drafts.traffic import CHAINS, Cost, Kind, Kinds, Simulation
from tests.support.engines.plans import decoding


def compute_bound(work: Work) -> float:
    """Seconds, as on two cores of a CPU: tokens are dear."""
    head = work.passes * (2.0 + 0.55 * work.drafting) if work.passes else 0.1 * work.rows
    return (15 + 2.6 * work.tokens + 1.7 * work.rows + 0.0005 * work.context + head) / 1000


def memory_bound(work: Work) -> float:
    """Seconds, where reading the weights takes most of the time."""
    head = work.passes * (1.0 + 0.05 * work.drafting) if work.passes else 0.02 * work.rows
    return (20 + 0.3 * work.tokens + 0.05 * work.rows + head) / 1000


def measured(cost: Cost) -> StepCosts:
    samples = []
    for rows in (1, 4, 16):
        for shape in (ROOT, CHAINS[0], CHAINS[-1]):
            work = Padding().work([shape.num_nodes - 1] * rows, shape, 8 * rows)
            samples.append(Sample(work, cost(work)))
    return StepCosts.fitted(samples)


GREEDY, SAMPLED = Kind((0.75, 0.7, 0.65)), Kind((0.5, 0.45, 0.4), sampled=True)
HOPELESS = Kind((0.03,))
TRAFFIC: dict[str, Kinds] = {
    "greedy": lambda row, step: GREEDY,
    "sampled": lambda row, step: SAMPLED,
    "mixed": lambda row, step: (GREEDY, SAMPLED)[row % 2],
    "hopeless": lambda row, step: HOPELESS,
    "partly hopeless": lambda row, step: (GREEDY, HOPELESS)[row % 2],
}
COSTS = {cost.__name__: cost for cost in (compute_bound, memory_bound)}
STEPS = {1: 500, 4: 250, 8: 200, 16: 120, 32: 100}  # by rows


def run(traffic: str, cost: str, num_rows: int, most_steps: int = 1000) -> Simulation:
    simulation = Simulation(COSTS[cost], TRAFFIC[traffic], num_rows)
    planner = AdaptivePlanner(CHAINS, measured(COSTS[cost]))
    simulation.run(planner, min(most_steps, STEPS[num_rows]), warm_up=50)
    return simulation


@pytest.mark.parametrize(
    ("traffic", "cost", "num_rows"),
    [
        ("greedy", "compute_bound", 1),
        ("sampled", "memory_bound", 4),
        ("partly hopeless", "memory_bound", 8),
        ("hopeless", "compute_bound", 1),
        ("hopeless", "memory_bound", 16),
    ],
)
def test_it_is_near_the_best_and_never_worse_than_plain_decoding(
    traffic: str, cost: str, num_rows: int
) -> None:
    simulation = run(traffic, cost, num_rows)
    assert simulation.seconds < 1.02 * simulation.plain
    assert simulation.seconds < 1.06 * simulation.best


@pytest.mark.extended
@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("traffic", TRAFFIC)
@pytest.mark.parametrize("num_rows", STEPS)
def test_the_same_with_any_traffic(traffic: str, cost: str, num_rows: int) -> None:
    simulation = run(traffic, cost, num_rows)
    assert simulation.seconds < 1.03 * simulation.plain
    assert simulation.seconds < 1.06 * simulation.best


@pytest.mark.parametrize("kinds", [(GREEDY, HOPELESS), (HOPELESS, GREEDY)], ids=["ends", "begins"])
def test_a_change_of_the_traffic_is_noticed(kinds: tuple[Kind, Kind]) -> None:
    simulation = Simulation(compute_bound, lambda _, step: kinds[step >= 300], 4)
    simulation.run(AdaptivePlanner(CHAINS, measured(compute_bound)), 300, warm_up=350)
    assert simulation.seconds < 1.07 * simulation.best


def spikes(luck: random.Random) -> float:
    """Some steps wait for a processor that others use."""
    return luck.uniform(1.3, 2.5) if luck.random() < 0.15 else 1.0


class Phases:
    """The machine is slower for some thirty steps, now and then."""

    def __init__(self) -> None:
        self._factor = 1.0

    def __call__(self, luck: random.Random) -> float:
        if luck.random() < 1 / 30:
            self._factor = luck.choice((1.0, 1.25, 1.6))
        return self._factor * luck.gauss(1.0, 0.06)


def one_row(work: Work) -> float:
    """Seconds, as measured with quantised weights on two cores of a CPU."""
    head = 0.55 + 0.55 * work.passes if work.passes else 0.0
    return (4.3 + 0.25 * (work.tokens - work.rows) + head + 0.0003 * work.context) / 1000


@pytest.mark.parametrize("disturbed", [spikes, Phases()], ids=["spikes", "phases"])
def test_a_machine_that_others_use_does_not_hide_what_pays(
    disturbed: Callable[[random.Random], float],
) -> None:
    """Disturbed steps are seen as they come; what counts is what they take without."""
    kinds = [Kind((chance, chance - 0.05)) for chance in (0.62, 0.45, 0.52, 0.35, 0.7, 0.5)]
    found = []
    for seed in range(3):
        simulation = Simulation(one_row, lambda _, step: kinds[step // 110 % 6], 1, seed=seed)
        simulation.disturbed, simulation.resumed = disturbed, 0.0015
        simulation.run(AdaptivePlanner(CHAINS, measured(one_row)), 1200, warm_up=100)
        found.append(simulation.seconds / simulation.best)
    assert statistics.mean(found) < 1.07


def test_what_pays_is_found_within_fifty_steps() -> None:
    simulation = Simulation(compute_bound, TRAFFIC["greedy"], 1)
    simulation.run(AdaptivePlanner(CHAINS, measured(compute_bound)), 50)
    assert simulation.seconds < 1.15 * simulation.best
    simulation.run(AdaptivePlanner(CHAINS, measured(compute_bound)), 50, warm_up=50)
    assert simulation.seconds < 1.05 * simulation.best


def test_drafts_that_cost_more_than_they_seem_to_are_given_up() -> None:
    """Whatever the estimates say, drafts may not lose more than a small share of the time."""

    class Blind(StepCosts):
        def observe(self, sample: Sample) -> None:
            """Learns nothing."""

    def cheap(work: Work) -> float:
        return (20 + 0.1 * work.tokens) / 1000

    known = measured(cheap)
    costs = Blind(known.values, known.doubts, known.drifts, known.limits, known.scale)
    simulation = Simulation(
        lambda work: 0.02 * (1.0 if work.passes == 0 else 1.9), TRAFFIC["sampled"], 4
    )
    simulation.run(AdaptivePlanner(CHAINS, costs), 150, warm_up=50)
    assert simulation.seconds < 1.03 * simulation.plain


def test_costs_that_were_measured_wrongly_are_put_right() -> None:
    def cheap(work: Work) -> float:
        return (20 + 0.1 * work.tokens) / 1000

    simulation = Simulation(compute_bound, TRAFFIC["sampled"], 16)
    simulation.run(AdaptivePlanner(CHAINS, measured(cheap)), 200, warm_up=200)
    assert simulation.seconds < 1.03 * simulation.plain


def test_costs_that_are_all_wrong_do_not_let_drafts_lose_more() -> None:
    """The machine is three times as fast as when it was measured: what a plain step is predicted
    to take must not make drafts look good."""
    costs = measured(compute_bound)
    costs.scale *= 3
    simulation = Simulation(compute_bound, TRAFFIC["hopeless"], 16)
    simulation.run(AdaptivePlanner(CHAINS, costs), 120)
    assert simulation.seconds < 1.03 * simulation.plain


def test_what_drafts_take_besides_their_nodes_has_a_price_of_its_own() -> None:
    def dear_entry(work: Work) -> float:
        return compute_bound(work) + 0.01 * (work.tokens > work.rows)

    costs = measured(dear_entry)
    for _ in range(100):
        for nodes in (0, 1, 2, 5):
            work = Padding().work([0] * 8, ROOT, 800)
            work = replace(work, tokens=8 + nodes)
            costs.observe(Sample(work, dear_entry(work)))
    plain = Padding().work([0] * 8, ROOT, 800)
    rate = 8 / dear_entry(plain)
    entry, price = entry_price(costs, plain), node_price(costs, plain)
    assert entry > 0.004 * rate
    for nodes in (1, 2, 5):
        truth = (0.01 + 0.0026 * nodes) * rate
        assert entry + price * nodes == pytest.approx(truth, rel=0.35)


def candidates(num_rows: int, most: int = 5) -> list[Candidate]:
    return [Candidate(line, False, 100, most) for line in range(num_rows)]


def step(
    planner: AdaptivePlanner,
    num_rows: int,
    accepts: bool,
    room: int = 5,
    seconds: float | None = None,
) -> Choice:
    """Choose, and report a step in which rows had at most `room` nodes."""
    choice = planner.choose(candidates(num_rows))
    nodes = [min(choice.limit(line), room) for line in range(num_rows)]
    rows = tuple(decoding(line, count) for line, count in enumerate(nodes))
    outcomes = tuple(
        RowOutcome((1,) * (1 + count * accepts), count, tuple(range(1, 1 + count * accepts)))
        for count in nodes
    )
    plan = StepPlan(rows=rows, shape=choice.shape)
    planner.observe(plan, StepOutcome(outcomes), seconds)
    return choice


def test_a_row_that_never_accepts_is_left_alone_but_tried_again() -> None:
    """Without times, so the account stays full: most trials that there can be."""
    planner = AdaptivePlanner(CHAINS, measured(compute_bound))
    drafted = [step(planner, 1, accepts=False).limit(0) for _ in range(600)]
    assert 0 < sum(count > 0 for count in drafted[:50]) < 12
    assert 1 <= sum(count > 0 for count in drafted[100:]) <= 80


def test_a_plain_choice_stands_until_rows_come(monkeypatch: pytest.MonkeyPatch) -> None:
    planner = AdaptivePlanner(CHAINS, measured(compute_bound))
    while planner._num_standing < 7:
        step(planner, 2, accepts=False)
    planned: list[int] = []
    monkeypatch.setattr(Account, "is_reference", lambda *_: bool(planned.append(1)) or True)
    for num_rows in (2, 2, 1, 2, 1, 1, 2):
        assert step(planner, num_rows, accepts=False).shape == ROOT
    assert not planned
    step(planner, 2, accepts=False)
    assert len(planned) == 1
    step(planner, 3, accepts=False)
    assert len(planned) == 2


def test_plain_steps_that_nothing_is_learnt_from_count_for_the_account(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    planner = AdaptivePlanner(CHAINS, measured(compute_bound))
    while planner._num_standing < 7:
        step(planner, 2, accepts=False)
    before, settled = planner._num_passed, list[int]()
    monkeypatch.setattr(Account, "settle", lambda *_, num_steps: settled.append(num_steps))
    for _ in range(8):
        step(planner, 2, accepts=False, seconds=0.02)
    assert sum(settled) + planner._num_passed == before + 8
    assert max(settled) == 4


def test_a_choice_of_drafts_stands_while_rows_end() -> None:
    planner = AdaptivePlanner(CHAINS, measured(memory_bound))
    for _ in range(300):
        if step(planner, 4, accepts=True).shape != ROOT and planner._num_standing:
            break
    assert step(planner, 1, accepts=True).shape != ROOT


def test_while_the_account_is_overdrawn_nothing_is_drafted_or_looked_up() -> None:
    planner = AdaptivePlanner(CHAINS, measured(memory_bound))
    first, choice = planner.choose(candidates(4)), planner.choose(candidates(4))
    assert (first.shape, first.price) == (ROOT, 1.0)  # shows what a plain step takes
    assert choice.limit(3) > 0
    assert choice.price < 1
    rows = tuple(decoding(line, choice.limit(line)) for line in range(4))
    lost = StepOutcome(tuple(RowOutcome((1,), row.num_draft) for row in rows))
    for _ in range(20):
        planner.observe(StepPlan(rows=rows, shape=choice.shape), lost, 0.06)
    overdrawn = planner.choose(candidates(4))
    assert (overdrawn.shape, overdrawn.price, overdrawn.may_try) == (ROOT, 1.0, False)


def test_while_drafts_pay_a_plain_step_now_and_then_shows_what_it_takes() -> None:
    planner = AdaptivePlanner(CHAINS, measured(memory_bound))
    drafted = [step(planner, 2, accepts=True, seconds=0.02).limit(0) > 0 for _ in range(100)]
    assert 3 <= drafted.count(False) <= 6


def test_padded_steps_draft_for_every_row_or_none() -> None:
    padding = Padding(lambda count: 8, whole_trees=True)
    planner = AdaptivePlanner(CHAINS, measured(memory_bound), padding)
    step(planner, 3, accepts=True)  # plain
    choice = step(planner, 3, accepts=True)
    assert choice.limits is None
    assert choice.shape in CHAINS
    for _ in range(100):
        choice = step(planner, 3, accepts=False)
    assert choice.shape == ROOT


def wanting(planner: AdaptivePlanner, least: tuple[int, ...], seconds: float) -> list[Choice]:
    """Forty steps of rows that accept nothing, and want so many nodes."""
    choices = []
    for _ in range(40):
        rows = [Candidate(line, False, 100, 5, count) for line, count in enumerate(least)]
        choices.append(choice := planner.choose(rows))
        nodes = [choice.limit(row.line) for row in rows]
        plan = StepPlan(
            rows=tuple(decoding(line, count) for line, count in enumerate(nodes)),
            shape=choice.shape,
        )
        outcome = StepOutcome(tuple(RowOutcome((1,), count, ()) for count in nodes))
        planner.observe(plan, outcome, seconds)
    return choices


def test_rows_that_want_drafts_get_them_and_the_account_does_not_pay() -> None:
    planner = AdaptivePlanner(CHAINS, measured(compute_bound))
    choices = wanting(planner, (3, 0, 1), seconds=0.08)
    assert min(choice.limit(0) for choice in choices) == 3
    assert min(choice.limit(2) for choice in choices) == 1
    assert sum(choice.limit(1) > 0 for choice in choices) < 10  # trials of its own
    assert {choice.shape for choice in choices} <= {chain(3), chain(5)}
    assert not planner._account.is_overdrawn(3)
    assert max(choice.limit(0) for choice in wanting(planner, (0,), seconds=0.02)[20:]) <= 1


def test_more_is_wanted_than_the_largest_shape_has() -> None:
    planner = AdaptivePlanner(CHAINS, measured(compute_bound), Padding(whole_trees=True))
    choices = wanting(planner, (60, 0), seconds=0.08)
    assert {choice.shape for choice in choices} == {CHAINS[-1]}
    assert choices[-1].limits is None


def test_a_head_that_has_failed_is_not_asked() -> None:
    planner = AdaptivePlanner(CHAINS, measured(memory_bound))
    planner.choose(candidates(1))  # plain
    assert planner.choose(candidates(1)).limit(0) > 0
    planner.observe(StepPlan(), StepOutcome(draft_failed=True), None)
    assert planner.choose(candidates(1)).limit(0) == 0


def test_a_fixed_shape_is_for_every_row_and_its_promise_is_what_it_brought() -> None:
    planner = FixedPlanner(chain(2))
    assert planner.choose(candidates(2, most=0)).shape == ROOT
    choice = planner.choose(candidates(2))
    assert (choice.shape, choice.limit(0), choice.limit(9)) == (chain(2), 2, 2)
    before = choice.promise(0)
    row, result = decoding(0, 2), RowOutcome((1, 1, 1), 2, (1, 2))
    for _ in range(200):
        planner.observe(StepPlan(rows=(row,), shape=chain(2)), StepOutcome((result,)), None)
    assert planner.choose(candidates(2)).promise(0) - before == pytest.approx(2, abs=0.1)
