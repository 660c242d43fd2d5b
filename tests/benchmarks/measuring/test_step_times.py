"""The timed steps of an engine compute what their names say."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks.measuring import step_times
from benchmarks.measuring.device_timing import Span
from benchmarks.measuring.step_times import Load, steps, time_steps
from configs.schema import Config
from engine.core import EngineCore
from engine.runner.forms import StepForm
from engine.runner.graphs import GraphedStep
from engine.runner.runner import ModelRunner
from engine.step.plan import StepPlan
from kernels.ops import Ops
from tests.support.engines.tiny_engine import TinyEngine, random_llama

CHUNK = 48
SAME_TOKEN = {"logit_bias": {7: 100.0}}


def tiny(ops: Ops, load: Load) -> EngineCore:
    settings = load.settings(Config())
    return TinyEngine(
        random_llama(),
        ops,
        max_model_len=1024,
        num_blocks=200,
        padded=True,
        max_num_seqs=9,
        max_num_batched_tokens=settings.scheduler.max_num_batched_tokens if load.chunk else 1024,
        lookup=load.lookup,
        run_ahead=load.run_ahead,
    ).build()


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[StepPlan, StepForm]]:
    seen: list[tuple[StepPlan, StepForm]] = []
    launch = ModelRunner.launch

    def noting(self: ModelRunner, plan: StepPlan) -> Any:
        found = launch(self, plan)
        seen.append((plan, self._builder.form(plan)))
        return found

    monkeypatch.setattr(ModelRunner, "launch", noting)
    return seen


def timed_forms(
    core: EngineCore, load: Load, launched: list[tuple[StepPlan, StepForm]]
) -> Iterator[tuple[StepPlan, StepForm]]:
    running = steps(core, load)
    list(itertools.islice(running, step_times.WARM_UP))
    launched.clear()
    list(itertools.islice(running, 12))
    yield from launched


@pytest.mark.parametrize(
    ("load", "wanted"),
    [
        (Load(), {"is_penalised": False, "num_top": -1, "num_bias": 0, "num_known": 0}),
        (Load(run_ahead=True), {"is_penalised": False, "num_bias": 0}),
        (Load(params={"frequency_penalty": 0.2}), {"is_penalised": True, "num_bias": 0}),
        (Load(params={"logprobs": 5}), {"num_top": 8}),
        (Load(params=SAME_TOKEN), {"num_bias": 8, "num_known": 0}),
        (Load(params=SAME_TOKEN, lookup=True), {"num_bias": 8, "num_known": 16}),
        (Load(rows=8), {"num_rows": 8, "only_roots": True}),
        (Load(rows=8, chunk=CHUNK), {"num_rows": 9, "only_roots": False, "draws": True}),
    ],
    ids=["plain", "ahead", "penalties", "logprobs", "bias", "lookup", "rows", "chunk"],
)
def test_every_timed_step_is_of_one_form(
    native_ops: Ops,
    load: Load,
    wanted: dict[str, object],
    launched: list[tuple[StepPlan, StepForm]],
) -> None:
    found = list(timed_forms(tiny(native_ops, load), load, launched))
    assert len({form for _, form in found}) == 1
    for plan, form in found:
        assert {name: getattr(form, name) for name in wanted} == wanted
        assert plan.ahead == load.run_ahead
        chunks = [len(row.token_ids) for row in plan.rows]
        assert chunks == [1] * load.rows + [load.chunk] * bool(load.chunk)


class Clock:
    """A device event: 1.5 ms after the previous one."""

    now = 0.0

    def record(self) -> None:
        Clock.now += 1.5
        self.at = Clock.now

    def synchronize(self) -> None: ...

    def elapsed_time(self, later: Clock) -> float:
        return later.at - self.at


def new_span() -> Span:
    return Clock(), Clock()


def test_times_are_those_of_replays(native_ops: Ops, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_times, "new_span", new_span)
    core = tiny(native_ops, Load())
    step = core.step

    def replaying() -> Any:
        GraphedStep._launch(None)  # type: ignore[arg-type]
        return step()

    monkeypatch.setattr(GraphedStep, "_launch", lambda self: None)
    monkeypatch.setattr(core, "step", replaying)
    found = time_steps(core, Load())
    assert found["device_ms"] == found["idle_us"] / 1000 == 1.5
    assert found["gap_us"] == pytest.approx(1000 * (found["step_ms"] - 1.5))


def test_steps_without_a_graph_are_not_timed(native_ops: Ops) -> None:
    with pytest.raises(RuntimeError, match="0 of 60 steps were replays of a CUDA graph"):
        time_steps(tiny(native_ops, Load()), Load())


def test_a_load_changes_its_part_of_the_configuration() -> None:
    config = Load(rows=8, chunk=512, lookup=True, run_ahead=True).settings(Config())
    assert config.scheduler.max_num_batched_tokens == 520
    assert config.scheduler.run_ahead
    assert config.speculation.lookup
    plain = Load().settings(Config())
    assert plain.scheduler.max_num_batched_tokens == Config().scheduler.max_num_batched_tokens
    assert plain.scheduler.run_ahead is False
    assert plain.speculation.lookup is False
