"""Steps with another draft head are captured before it is put to use, not while it serves."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine.core import EngineCore
from engine.messages import SwapDraft
from engine.request import Request
from engine.runner import graphs
from engine.runner.forms import StepForm
from engine.runner.graphs import StaticStep
from engine.runner.runner import ModelRunner, StepSettings
from engine.speculation.planner import FixedPlanner
from engine.speculation.proposer import Proposer
from engine.step.shape import chain
from kernels.ops import Ops
from server.assembly.swaps import DraftSwaps
from tests.support.engines.in_process import ask, generate
from tests.support.engines.tiny_engine import TinyEngine, random_llama
from tests.support.heads.head_lab import HeadLab, write_head

SHAPE = chain(2)
NUM_FORMS = 8  # one or two rows, the root or a chain, with and without filters

Captured = list[tuple[Proposer, StepForm]]


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> Captured:
    """What is captured, by a step that only notes it."""
    found: Captured = []

    class Noting(StaticStep):
        seconds, num_bytes = 0.0, 0

        def __init__(self, body: Any, form: StepForm, like: Any, pool: Any) -> None:
            super().__init__(body, form, like)
            found.append((body.proposer, form))

    monkeypatch.setattr(graphs, "GraphedStep", Noting)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    return found


@pytest.fixture(scope="module")
def lab(native_ops: Ops, tmp_path_factory: pytest.TempPathFactory) -> HeadLab:
    engine = TinyEngine(random_llama(), native_ops, max_model_len=64, max_num_seqs=2)
    engine = replace(engine, num_blocks=16, padded=True)
    return HeadLab(engine, write_head(engine, tmp_path_factory.mktemp("head") / "eagle3"))


def requests() -> list[Request]:
    return [ask(f"{at}", [5 + at, 6, 7], max_tokens=9, ignore_eos=True) for at in range(2)]


def texts(core: EngineCore) -> list[list[int]]:
    heard = generate(core, requests())
    return [heard[request.request_id].token_ids for request in requests()]


def capturing(lab: HeadLab) -> tuple[EngineCore, ModelRunner]:
    core, _ = lab.build(FixedPlanner(SHAPE))
    usual = core._executor
    assert isinstance(usual, ModelRunner)
    runner = ModelRunner(replace(usual._parts, steps=StepSettings(exact=False, graphs=True)))
    core._executor = runner
    return core, runner


def test_steps_are_captured_one_by_one_before_the_swap_and_never_after(
    lab: HeadLab, captured: Captured
) -> None:
    truth = texts(lab.build(FixedPlanner(SHAPE))[0])
    core, runner = capturing(lab)
    runner.prepare([SHAPE])
    assert len(captured) == NUM_FORMS
    other = lab.build(FixedPlanner(SHAPE))[1]
    for count, _ in enumerate(runner.prepare_swap(other, [SHAPE]), 1):
        assert sum(proposer is other for proposer, _ in captured) == count
        if count == 3:
            assert texts(core) == truth, "the current head serves meanwhile"
    ready = [form for proposer, form in captured if proposer is other]
    assert len(set(ready)) == NUM_FORMS
    runner.draft_with(other)
    captured.clear()
    assert texts(core) == truth
    assert texts(core) == truth
    assert not {form for _, form in captured} & set(ready)
    assert core.stats().num_drafts > 0


def test_what_was_captured_for_another_proposer_is_not_used(
    lab: HeadLab, captured: Captured
) -> None:
    core, runner = capturing(lab)
    wanted, other = (lab.build(FixedPlanner(SHAPE))[1] for _ in range(2))
    for _ in runner.prepare_swap(other, [SHAPE]):
        pass
    runner.draft_with(wanted)
    assert runner._body.proposer is wanted
    assert texts(core) == texts(lab.build(FixedPlanner(SHAPE))[0])


def test_a_swap_waits_until_every_step_is_captured() -> None:
    done: list[str] = []

    class Swapper:
        def load(self, path: str | None) -> None:
            done.append("load")

        def prepare_swap(self, loaded: None) -> Iterator[None]:
            for at in range(3):
                done.append(f"capture {at}")
                yield
            return "drafting"  # type: ignore[return-value]

        def swap(self, loaded: None, drafting: str) -> None:
            done.append(f"swap {drafting}")

    core: Any = SimpleNamespace(info=SimpleNamespace(draft=None))
    swaps = DraftSwaps(core, Swapper())  # type: ignore[arg-type]
    swaps.ask(SwapDraft("a", None))
    swaps._loading = Future()
    swaps._loading.set_result(None)
    for count in range(1, 4):
        assert swaps.settle() == []
        assert swaps.busy
        assert done == [f"capture {at}" for at in range(count)]
    answers = swaps.settle()
    assert [answer.request_id for answer in answers] == ["a"]
    assert done[3:] == ["swap drafting"]
    assert not swaps.busy
