"""Llama 4 in the engine: no text depends on chunks of prompts, company or drafts, although rows
cross the borders of attention chunks (of 24 positions) at every place."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from engine.request import Request
from engine.speculation.planner import FixedPlanner
from engine.step.shape import TreeShape, chain
from kernels.ops import Ops
from tests.engine.test_engine_equality import prompt, tokens_of
from tests.engine.test_speculation_equality import Truth
from tests.support.drafts.scripted_proposer import DYNAMIC, TREES
from tests.support.engines.in_process import ask, generate
from tests.support.engines.tiny_engine import TinyEngine
from tests.support.heads.head_lab import SHAPES, HeadLab, write_head
from tests.support.machine import pretend_device
from tests.support.models.greedy import greedy_margins
from tests.support.models.tiny_llama4 import random_llama4

MAX_LEN = 120  # as the scripted proposer assumes


def requests() -> list[Request]:
    return [
        ask("greedy", prompt(5, 1), max_tokens=64, ignore_eos=True, seed=1),
        ask("long", prompt(50, 2), max_tokens=64, ignore_eos=True, seed=2),
        ask("at a border", prompt(24, 3), max_tokens=40, temperature=1.0, seed=3),
        ask("hot", prompt(47, 4), max_tokens=40, temperature=1.5, seed=4, repetition_penalty=1.2),
    ]


@pytest.fixture(scope="module")
def truth(native_ops: Ops) -> Truth:
    engine = TinyEngine(
        random_llama4(), native_ops, max_model_len=MAX_LEN, max_num_batched_tokens=1100
    )
    return Truth.of(engine, requests())


def test_greedy_text_is_that_of_transformers(truth: Truth) -> None:
    for request in requests()[:2]:
        output = truth.heard[request.request_id].token_ids
        assert len(output) == 64
        assert greedy_margins(truth.engine.oracle, request.prompt_ids, output).min() > 1e-4


COMPANY: dict[str, dict[str, Any]] = {
    "odd-chunks": {"max_num_batched_tokens": 13, "max_num_seqs": 3},
    "chunks-beyond-a-border": {"max_num_batched_tokens": 31},
    "preempted": {"num_blocks": 12},
    "padded": {"padded": True, "max_num_batched_tokens": 53},
    "lookup": {"lookup": True},
}


@pytest.mark.parametrize("name", COMPANY)
def test_no_text_depends_on_how_its_steps_are_cut(truth: Truth, name: str) -> None:
    core = replace(truth.engine, **COMPANY[name]).build()
    assert tokens_of(generate(core, requests())) == tokens_of(truth.heard)


@pytest.mark.parametrize(
    ("shape", "acceptance"),
    [(chain(7), 1.0), (TREES[-1], 0.7), (DYNAMIC[0], 0.7)],
    ids=["chain", "tree", "dynamic"],
)
def test_drafts_end_at_the_border_of_a_chunk(
    truth: Truth, shape: TreeShape, acceptance: float
) -> None:
    core = truth.speculating(FixedPlanner(shape), acceptance)
    truth.check(generate(core, truth.requests))
    stats = core.stats()
    assert stats.num_accepted_tokens > stats.num_drafts


@pytest.fixture(scope="module")
def lab(truth: Truth, tmp_path_factory: pytest.TempPathFactory) -> HeadLab:
    """With an EAGLE-3 head."""
    head = tmp_path_factory.mktemp("head") / "eagle3"
    return HeadLab(truth.engine, write_head(truth.engine, head))


@pytest.mark.parametrize(("shape", "padded"), [("tree", True), ("dynamic", False)])
def test_an_eagle3_head_drafts_for_it(truth: Truth, lab: HeadLab, shape: str, padded: bool) -> None:
    there = replace(lab, engine=replace(lab.engine, padded=padded))
    core, _ = there.build(FixedPlanner(SHAPES[shape]))
    assert tokens_of(generate(core, requests())) == tokens_of(truth.heard)
    assert core.stats().num_drafts > 0


def test_its_steps_stay_on_the_device(truth: Truth, lab: HeadLab) -> None:
    ops = pretend_device.operations_of(lab.engine.ops)
    changes: dict[str, Any] = {"ops": ops, "device": pretend_device.DEVICE}
    there = replace(
        lab, engine=replace(lab.engine, **changes, max_num_batched_tokens=30, run_ahead=True)
    )
    with torch.inference_mode(), pretend_device.PretendDevice() as device:
        core, _ = there.build(FixedPlanner(SHAPES["tree"]))
        device.waits.clear()
        heard = generate(core, requests())
    assert device.waits == []
    assert tokens_of(heard) == tokens_of(truth.heard)
