"""Rounds launched before the host has heard of the one before give the texts of ordinary steps."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from engine import transfer
from engine.completion import Completion
from engine.core import EngineCore
from engine.messages import Abort, Finished, Submit, Tokens
from engine.request import FinishReason, Request
from engine.runner import graphs
from engine.runner.model_runner import ModelRunner
from engine.scheduler.plan import StepPlan
from engine.spec.planner import FixedPlanner, Planner
from engine.spec.proposer import Roots
from engine.spec.shape import ROOT, DynamicShape, StaticShape, TreeShape, chain
from engine.spec.tree import DraftTree
from kernels.ops import Ops
from tests.support import pretend_device
from tests.support.engines import ask, generate
from tests.support.head_lab import HeadLab, write_head
from tests.support.pretend_device import PretendDevice
from tests.support.scripted_proposer import CyclingPlanner
from tests.support.tiny_engine import TinyEngine, random_llama

SHAPES: dict[str, TreeShape] = {
    "root": ROOT,
    "chain3": chain(3),
    "tree": StaticShape("tree", (-1, 0, 0, 0, 1, 1, 2, 4, 4, 7)),
    "dynamic": DynamicShape("dynamic", 12, 4, 5),
}
MAX_LEN = 96


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def lab(native_ops: Ops, tmp_path_factory: pytest.TempPathFactory) -> HeadLab:
    engine = TinyEngine(random_llama(), native_ops, max_model_len=MAX_LEN)
    return HeadLab(engine, write_head(engine, tmp_path_factory.mktemp("head") / "eagle3"))


def ahead(lab: HeadLab, **changes: Any) -> HeadLab:
    return replace(lab, engine=replace(lab.engine, rounds=True, run_ahead=True, **changes))


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[StepPlan]:
    """What was launched, in order."""
    seen: list[StepPlan] = []
    launch = ModelRunner.launch

    def noting(self: ModelRunner, plan: StepPlan) -> Any:
        seen.append(plan)
        return launch(self, plan)

    monkeypatch.setattr(ModelRunner, "launch", noting)
    return seen


def requests() -> list[Request]:
    shared = [(7 * i) % 120 + 3 for i in range(40)]
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0, "max_tokens": 29},
        {"temperature": 0.8, "top_k": 12, "top_p": 0.8, "min_p": 0.01},
        {"temperature": 1.2, "max_tokens": 31, "min_tokens": 6},
        {"max_tokens": 3},
        {"max_tokens": 1},
        {"max_tokens": 2, "temperature": 1.0},
        {"temperature": 0.9, "presence_penalty": 0.5, "max_tokens": 6},
        {"logprobs": 2, "max_tokens": 5},
    ]
    return [
        ask(f"{at}", shared[: 3 + 4 * at], **({"max_tokens": 26, "seed": at} | kind))
        for at, kind in enumerate(kinds)
    ] + [ask("long", shared * 2, max_tokens=90, seed=99, temperature=1.0)]  # to the last position


@pytest.fixture(scope="module")
def plain(lab: HeadLab) -> dict[str, Completion]:
    return generate(lab.engine.build(), requests())


def same(heard: dict[str, Completion], expected: dict[str, Completion]) -> None:
    for name, record in heard.items():
        finished, wanted = record.finished, expected[name].finished
        assert finished is not None and wanted is not None
        assert record.token_ids == expected[name].token_ids, name
        assert finished.reason is wanted.reason
        assert finished.num_output == len(record.token_ids)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("per_step", [None, 1], ids=["together", "arriving"])
def test_texts_are_those_of_ordinary_steps(
    lab: HeadLab,
    plain: dict[str, Completion],
    shape: TreeShape,
    per_step: int | None,
    plans: list[StepPlan],
) -> None:
    core, proposer = ahead(lab).build(FixedPlanner(shape))
    same(generate(core, requests(), per_step=per_step), plain)
    assert not proposer.failed
    assert sum(plan.ahead for plan in plans) > 15
    drafting = [any(row.num_draft for row in plan.rows) for plan in plans if plan.ahead]
    assert sum(drafting) > 10 or shape is ROOT


@pytest.mark.parametrize(
    "changes",
    [
        {"max_num_batched_tokens": 17, "max_num_seqs": 3},
        {"num_blocks": 9},
        {"num_blocks": 9, "prefix_caching": False, "max_num_seqs": 4},
        {"max_num_seqs": 2},
    ],
    ids=["chunked", "preempted", "uncached", "queued"],
)
def test_company_and_memory_do_not_show(
    lab: HeadLab, plain: dict[str, Completion], changes: dict[str, Any], plans: list[StepPlan]
) -> None:
    shapes = (*SHAPES.values(), chain(1), ROOT)
    core, _ = ahead(lab, **changes).build(CyclingPlanner(shapes))
    same(generate(core, requests(), per_step=2), plain)
    assert sum(plan.ahead for plan in plans) > 10
    if "num_blocks" in changes:
        assert core.stats().num_preemptions > 0
