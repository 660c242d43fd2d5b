"""Heads that draft all tokens at once in the real engine: no token of any text depends on them, and
steps of fixed sizes draft what exact ones do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from drafter.heads.interface import ParallelHead
from engine.checkpoints.arch import LlamaArch
from engine.speculation.planner import FixedPlanner
from engine.step.shape import TreeShape, chain
from kernels.ops import Ops
from tests.engine.runner.test_padded_steps import MAX_LEN, texts_of
from tests.support.drafts.scripted_proposer import CyclingPlanner
from tests.support.engines.tiny_engine import TinyEngine, random_llama
from tests.support.heads.head_lab import SHAPES, HeadLab
from tests.support.heads.parallel_heads import write_parallel_head


@pytest.fixture(scope="module", params=["peagle", "dflash"])
def lab(
    request: pytest.FixtureRequest, native_ops: Ops, tmp_path_factory: pytest.TempPathFactory
) -> HeadLab:
    engine = TinyEngine(random_llama(), native_ops, max_model_len=MAX_LEN)
    target = LlamaArch.from_hf_config(engine.oracle.config.to_dict())
    folder = tmp_path_factory.mktemp("head") / request.param
    return HeadLab(engine, write_parallel_head(folder, target, request.param, draft_vocab=90))


@pytest.fixture(scope="module")
def plain(lab: HeadLab) -> dict[str, list[int]]:
    return texts_of(lab.engine.build())


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_the_text_is_that_of_plain_decoding(
    lab: HeadLab, plain: dict[str, list[int]], shape: TreeShape
) -> None:
    """Exact steps, and padded ones that run ahead, as on a GPU."""
    assert isinstance(lab.load_head(), ParallelHead)
    usual, _ = lab.build(FixedPlanner(shape))
    assert texts_of(usual) == plain
    fixed = replace(lab, engine=replace(lab.engine, padded=True))
    core, proposer = fixed.build(FixedPlanner(shape))
    assert texts_of(core) == plain
    assert not proposer.failed
    before, now = usual.stats(), core.stats()
    assert now.num_draft_faults == before.num_draft_faults == 0
    for name in ("num_steps", "num_drafts", "num_draft_tokens", "num_accepted_tokens"):
        assert getattr(now, name) == getattr(before, name), name


@pytest.mark.parametrize(
    "changes",
    [
        {"max_num_batched_tokens": 17, "max_num_seqs": 3},
        {"num_blocks": 11, "padded": True, "run_ahead": True},
    ],
    ids=["chunked", "preempted"],
)
def test_changing_shapes_batches_and_memory_do_not_change_texts(
    lab: HeadLab, plain: dict[str, list[int]], changes: dict[str, Any]
) -> None:
    engine = replace(lab.engine, **changes)
    core, proposer = replace(lab, engine=engine).build(CyclingPlanner((*SHAPES.values(), chain(1))))
    assert texts_of(core) == plain
    assert not proposer.failed
    assert core.stats().num_drafts > 0
