"""A tiny engine gives the same text with the Triton kernels as with the references."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.speculation.planner import FixedPlanner
from engine.step.shape import ROOT, DynamicShape, StaticShape, TreeShape, chain
from kernels.registry import triton_ops
from tests.kernels import triton_env
from tests.support.engines import ask, generate
from tests.support.head_lab import HeadLab, write_head
from tests.support.tiny_engine import TinyEngine, random_llama

triton_env.load("kernels.norm.triton_kernel")
pytestmark = [
    *triton_env.MARKS,
    pytest.mark.slow,
    pytest.mark.skipif(
        not triton_env.INTERPRETED, reason="on a GPU: python -m benchmarks.gpu_check"
    ),
]
SHAPES: tuple[TreeShape, ...] = (
    ROOT,
    chain(2),
    StaticShape("tree", (-1, 0, 0, 1, 1, 2)),
    DynamicShape("dynamic", 6, 2, 3),
)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> HeadLab:
    engine = TinyEngine(random_llama(), triton_ops(torch.float32), max_model_len=64, num_blocks=16)
    return HeadLab(engine, write_head(engine, tmp_path_factory.mktemp("head") / "eagle3"))


def texts(lab: HeadLab, shape: TreeShape) -> tuple[dict[str, list[int]], int]:
    """The texts of two requests, and the number of drafted trees."""
    core, proposer = lab.build(FixedPlanner(shape))
    asked = [
        ask("greedy", [9, 8, 7], max_tokens=7, ignore_eos=True),
        ask("hot", [5] * 17, max_tokens=5, temperature=0.9, top_p=0.8, seed=3, ignore_eos=True),
    ]
    heard = generate(core, asked)
    assert not proposer.failed
    assert proposer.num_faults == 0
    return {name: record.token_ids for name, record in heard.items()}, core.stats().num_drafts


@pytest.mark.parametrize("rounds", [False, True], ids=["through-the-host", "rounds"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_tokens_and_drafts_are_those_of_the_reference(
    lab: HeadLab, reference_ops: object, shape: TreeShape, rounds: bool, tmp_path: Path
) -> None:
    usual = replace(lab, engine=replace(lab.engine, ops=reference_ops))  # type: ignore[arg-type]
    interpreted = replace(lab, engine=replace(lab.engine, rounds=rounds))
    expected, drafts = texts(usual, shape)
    assert texts(interpreted, shape) == (expected, drafts)
    assert (drafts > 0) == (shape is not ROOT)
