"""A draft head that fails while steps run ahead costs only speed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from drafter.proposer import DraftProposer
from engine.speculation.planner import FixedPlanner
from engine.step.shape import chain
from kernels.ops import Ops
from tests.support.engines.in_process import ask, generate
from tests.support.engines.tiny_engine import TinyEngine, random_llama
from tests.support.heads.head_lab import HeadLab, write_head


def test_a_head_that_fails_between_two_steps_takes_no_request_down(
    native_ops: Ops, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = TinyEngine(random_llama(), native_ops, max_model_len=96)
    head = write_head(engine, tmp_path / "eagle3")
    asked = [ask("a", [3, 4, 5, 6], max_tokens=20, seed=1)]
    expected = generate(engine.build(), asked)
    take_in, calls = DraftProposer._run_entries, []

    def fail_once(self: DraftProposer, *args: Any) -> None:
        calls.append("take in")
        if len(calls) == 4:
            raise torch.OutOfMemoryError("out of memory, once")
        take_in(self, *args)

    monkeypatch.setattr(DraftProposer, "_run_entries", fail_once)
    ahead = HeadLab(replace(engine, padded=True, run_ahead=True), head)
    core, proposer = ahead.build(FixedPlanner(chain(3)))
    assert generate(core, asked)["a"].token_ids == expected["a"].token_ids
    assert len(calls) == 4, "a head that has failed is left alone"
    assert proposer.failed
