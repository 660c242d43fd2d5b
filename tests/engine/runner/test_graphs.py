"""Which forms of a step are captured, and when, with stand-ins for the steps themselves."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from engine.runner import graphs
from engine.runner.forms import Sizes, StepForm
from engine.runner.graphs import SEEN_OFTEN, DeviceSteps
from engine.runner.inputs import InputBuilder
from engine.runner.laps import NoLaps
from engine.sampling.lines import LineSettings
from engine.step.shape import ROOT

BUILDER = InputBuilder(Sizes(exact=False, max_num_seqs=2), LineSettings(2, 9, frozenset()),
                       64, 4, 99)  # fmt: skip
FORM, OTHER = list(BUILDER.likely_forms([ROOT]))[:2]


@dataclass
class StandIns:
    """Steps that only note that they were made and run."""

    made: list[str] = field(default_factory=list)
    ran: list[str] = field(default_factory=list)
    idle: list[StepForm] = field(default_factory=list)
    fails: bool = False  # nothing can be captured

    def plain(self, body: Any, form: StepForm, like: Any) -> Any:
        return self._step("plain")

    def captured(self, body: Any, form: StepForm, like: Any, pool: Any) -> Any:
        if self.fails:
            raise torch.OutOfMemoryError("no memory for a graph")
        return self._step("captured")

    def _step(self, kind: str) -> Any:
        self.made.append(kind)
        ran = self.ran

        class Step:
            seconds, num_bytes = 2.0, 1000

            def launch(self, inputs: Any) -> Any:
                ran.append(kind)
                return lambda: inputs

        return Step()

    def steps(self, *, graphs: bool = True) -> DeviceSteps:
        def idle(form: StepForm) -> Any:
            self.idle.append(form)

        return DeviceSteps(None, idle, graphs=graphs)  # type: ignore[arg-type]


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> StandIns:
    found = StandIns()
    monkeypatch.setattr(graphs, "StaticStep", found.plain)
    monkeypatch.setattr(graphs, "GraphedStep", found.captured)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    return found


def run(steps: DeviceSteps, form: StepForm, times: int) -> None:
    for number in range(times):
        outputs = steps.launch(number, form, NoLaps())  # type: ignore[arg-type]
        assert outputs() == number  # type: ignore[comparison-overlap]


def test_a_form_is_captured_when_it_is_asked_for_the_third_time_and_only_then(
    stand_ins: StandIns,
) -> None:
    steps = stand_ins.steps()
    run(steps, FORM, SEEN_OFTEN + 3)
    assert stand_ins.made == ["plain", "captured"]
    assert stand_ins.ran == ["plain"] * (SEEN_OFTEN - 1) + ["captured"] * 4
    assert (steps.seconds, steps.num_bytes) == (2.0, 1000)


def test_forms_are_counted_each_for_itself(stand_ins: StandIns) -> None:
    steps = stand_ins.steps()
    for _ in range(SEEN_OFTEN - 1):
        run(steps, FORM, 1)
        run(steps, OTHER, 1)
    assert stand_ins.made == ["plain"] * 2
    assert stand_ins.idle == [FORM, OTHER]
    run(steps, OTHER, 1)
    assert stand_ins.ran[-1] == "captured"
    assert stand_ins.idle == [FORM, OTHER, OTHER]


def test_a_form_that_was_prepared_is_captured_once_and_for_all(stand_ins: StandIns) -> None:
    steps = stand_ins.steps()
    steps.prepare(FORM)
    assert stand_ins.made == ["captured"]
    run(steps, FORM, SEEN_OFTEN + 3)
    assert stand_ins.made == ["captured"]
    assert set(stand_ins.ran) == {"captured"}
    run(steps, OTHER, 1)
    assert stand_ins.ran[-1] == "plain"


def test_without_graphs_a_form_keeps_its_buffers(stand_ins: StandIns) -> None:
    steps = stand_ins.steps(graphs=False)
    steps.prepare(FORM)
    assert stand_ins.made == []
    run(steps, FORM, SEEN_OFTEN + 3)
    assert stand_ins.made == ["plain"]


def test_steps_that_wait_for_grammars_are_not_captured(stand_ins: StandIns) -> None:
    steps = stand_ins.steps()
    run(steps, replace(FORM, is_masked=True), SEEN_OFTEN + 3)
    assert stand_ins.made == ["plain"]


def test_what_cannot_be_captured_runs_without_a_graph_and_is_not_tried_again(
    stand_ins: StandIns, caplog: pytest.LogCaptureFixture
) -> None:
    stand_ins.fails = True
    steps = stand_ins.steps()
    with caplog.at_level(logging.ERROR):
        run(steps, FORM, SEEN_OFTEN + 3)
    assert len([r for r in caplog.records if "no CUDA graph" in r.message]) == 1
    assert set(stand_ins.ran) == {"plain"}
    assert (steps.seconds, steps.num_bytes) == (0.0, 0)
