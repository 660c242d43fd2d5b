"""Steps are measured before the first request, on caches of any size."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import pytest

from engine.runner.measuring import ENOUGH, StepMeter
from engine.speculation.costs import Padding, Sample, StepCosts, Work
from engine.step.executor import Launched
from engine.step.plan import RowOutcome, StepOutcome, StepPlan
from engine.step.shape import ROOT, DynamicShape, StaticShape, TreeShape, chain
from tests.support.engines.in_process import ask, generate
from tests.support.engines.tiny_engine import TinyEngine


def step_meter(engine: TinyEngine) -> StepMeter:
    return StepMeter(
        engine.build()._executor,
        engine.num_blocks,
        16,
        engine.max_num_seqs,
        engine.max_num_batched_tokens,
        engine.max_model_len,
    )


@pytest.mark.parametrize(
    ("shape", "shortest"),
    [(ROOT, 3), (chain(3), 6), (StaticShape("star", (-1, *[0] * 15)), 22)],
    ids=["root", "chain3", "star"],
)
def test_a_tree_fits_from_some_context_length_on(
    tiny_engine: TinyEngine, shape: TreeShape, shortest: int
) -> None:
    fitting = [
        n for n in range(2, 60) if step_meter(replace(tiny_engine, max_model_len=n)).fits(shape)
    ]
    assert fitting == list(range(shortest, 60))


def test_a_dynamic_tree_needs_room_for_all_it_drafts(tiny_engine: TinyEngine) -> None:
    shape = DynamicShape("dynamic", 8, 5, 10)  # 41 nodes go through the head
    assert not step_meter(replace(tiny_engine, max_model_len=48)).fits(shape)
    assert step_meter(replace(tiny_engine, max_model_len=64)).fits(shape)


@pytest.mark.parametrize(("max_model_len", "num_blocks"), [(256, 128), (256, 10), (20, 2), (8, 1)])
def test_any_cache_can_be_measured_and_is_clean_afterwards(
    tiny_engine: TinyEngine, max_model_len: int, num_blocks: int
) -> None:
    engine = replace(tiny_engine, max_model_len=max_model_len, num_blocks=num_blocks)
    core = engine.build()
    measuring = StepMeter(core._executor, num_blocks, 16, 16, 64, max_model_len)
    costs = measuring.measure([ROOT])
    assert costs.num_observed > 0
    assert costs.of(Work(1, 1)) > 0
    heard = generate(core, [ask("after", [5, 6, 7], max_tokens=4, ignore_eos=True)])
    plain = generate(engine.build(), [ask("after", [5, 6, 7], max_tokens=4, ignore_eos=True)])
    assert heard["after"].token_ids == plain["after"].token_ids


@dataclass
class Compiling:
    """The first step with drafts of each shape is slow, as if kernels were compiled."""

    now: float = 0.0
    seen: set[TreeShape] = field(default_factory=set)

    def launch(self, plan: StepPlan) -> Launched:
        if plan.shape not in self.seen:
            self.seen.add(plan.shape)
            self.now += 1.2 * ENOUGH
        self.now += 0.001
        outcome = StepOutcome(tuple(RowOutcome((5,), row.num_draft, ()) for row in plan.rows))
        return Launched(plan, lambda: outcome)

    def collect(self, launched: Launched) -> StepOutcome:
        return launched.wait()


def test_what_only_the_first_step_of_a_tree_takes_is_not_its_cost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiling = Compiling()
    clock = SimpleNamespace(perf_counter=lambda: compiling.now)
    monkeypatch.setattr("engine.runner.measuring.time", clock)
    costs = StepMeter(compiling, 64, 16, 1, 64, 256).measure([ROOT, chain(3)])
    assert costs.of(Work(1, 4, 1, 3)) == pytest.approx(0.001, rel=0.1)


@dataclass
class Slow:
    """Each row of a step takes a second."""

    now: float = 0.0

    def launch(self, plan: StepPlan) -> Launched:
        self.now += len(plan.rows)
        outcome = StepOutcome(tuple(RowOutcome((5,), row.num_draft, ()) for row in plan.rows))
        return Launched(plan, lambda: outcome)

    def collect(self, launched: Launched) -> StepOutcome:
        return launched.wait()


def test_slow_steps_are_measured_for_few_rows(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    slow = Slow()
    clock = SimpleNamespace(perf_counter=lambda: slow.now)
    monkeypatch.setattr("engine.runner.measuring.time", clock)
    caplog.set_level("INFO")
    costs = StepMeter(slow, 4096, 16, 64, 512, 256).measure([ROOT, chain(3)])
    assert costs.of(Work(1, 1)) == pytest.approx(1.0, rel=0.1)
    assert costs.of(Work(1, 4, 1, 3)) == pytest.approx(1.0, rel=0.1)
    assert "trees were measured for up to 1 rows" in caplog.text
    assert slow.now < 10


def test_known_costs_are_checked_with_a_few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    executor = Slow()
    clock = SimpleNamespace(perf_counter=lambda: executor.now)
    monkeypatch.setattr("engine.runner.measuring.time", clock)
    step_meter = StepMeter(executor, 4096, 16, 64, 512, 256)
    works = [Padding().work([n], chain(1), 8) for n in (0, 1)]
    same = StepCosts.fitted([Sample(work, 0.5) for work in works])
    assert step_meter.agrees(same, chain(1))
    assert same.of(works[0]) == pytest.approx(1.0, rel=0.05)
    other = StepCosts.fitted([Sample(works[0], 1.0), Sample(works[1], 2.0)])
    assert not step_meter.agrees(other, chain(1))
