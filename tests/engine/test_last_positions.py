"""Rows at the end of their context, beside rows that draft deep: nothing reads beyond a table."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from engine.completion import Completion
from engine.core import EngineCore
from engine.request import FinishReason, Request
from engine.speculation.planner import FixedPlanner
from engine.step.shape import DynamicShape, StaticShape, TreeShape, chain
from kernels.ops import Ops
from tests.support.engines.in_process import ask, generate
from tests.support.engines.tiny_engine import TinyEngine, random_llama
from tests.support.heads.head_lab import HeadLab, write_head
from tests.support.machine.guarded_memory import check_guards, guard

CONTEXT = 96
SHAPES: tuple[TreeShape, ...] = (
    chain(6),
    StaticShape("tree", (-1, 0, 0, 0, 1, 1, 2, 4, 4, 7)),
    DynamicShape("dynamic", 12, 4, 5),
)


@pytest.fixture(scope="module")
def lab(native_ops: Ops, tmp_path_factory: pytest.TempPathFactory) -> HeadLab:
    engine = TinyEngine(random_llama(), native_ops, max_model_len=CONTEXT, num_blocks=24)
    return HeadLab(engine, write_head(engine, tmp_path_factory.mktemp("head") / "eagle3"))


def requests() -> list[Request]:
    """Two rows that end at the last position, one or two tokens away, and two far from it."""
    return [
        ask(f"{length}", [(5 * at) % 120 + 3 for at in range(length)], **kind)
        for length, kind in (
            (CONTEXT - 1, {"max_tokens": 9}),
            (CONTEXT - 5, {"max_tokens": 9, "ignore_eos": True, "temperature": 1.0}),
            (7, {"max_tokens": 12}),
            (9, {"max_tokens": 12, "temperature": 0.8, "seed": 4}),
        )
    ]


def answers(core: EngineCore) -> dict[str, Completion]:
    return generate(core, requests())


@pytest.mark.parametrize("padded", [False, True], ids=["exact", "padded"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_no_step_reads_or_writes_beyond_its_tables(
    lab: HeadLab, shape: TreeShape, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {"padded": padded}
    there = replace(lab, engine=replace(lab.engine, **changes))
    usual, _ = there.build(FixedPlanner(shape))
    expected = answers(usual)
    tensors = guard(monkeypatch)
    core, proposer = there.build(FixedPlanner(shape))
    assert len(tensors) >= 6, "tables and pages of the target and of the head"
    found = answers(core)
    check_guards(tensors)
    assert {n: r.token_ids for n, r in found.items()} == {
        n: r.token_ids for n, r in expected.items()
    }
    last = found[str(CONTEXT - 5)].finished
    assert last is not None
    assert (last.reason, last.num_prompt + last.num_output) == (FinishReason.LENGTH, CONTEXT)
    before, now = usual.stats(), core.stats()
    assert now.num_drafts > 0
    for name in ("num_drafts", "num_draft_tokens", "num_accepted_tokens"):
        assert getattr(now, name) == getattr(before, name), name
    assert (now.num_draft_faults, now.num_unsound, proposer.failed) == (0, 0, False)
