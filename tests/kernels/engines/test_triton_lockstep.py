"""Answers in lockstep are the same with the Triton kernels as with the references."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from drafter.train.answers.lockstep import ON_DEVICE, Pace, Question
from kernels.ops import Ops
from kernels.registry import triton_ops
from tests.drafter.train.test_lockstep import asking, by_tag, load, lockstep
from tests.kernels import triton_env

triton_env.load("kernels.norm.triton_kernel")
pytestmark = [
    *triton_env.MARKS,
    pytest.mark.extended,
    pytest.mark.skipif(
        not triton_env.INTERPRETED, reason="on a GPU: python -m benchmarks.lockstep"
    ),
]
SMALL = {
    "num_hidden_layers": 1,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "head_dim": 32,
}
PADDED = replace(ON_DEVICE, steps=2, padded_prompts=4, padded_tokens=16)


def answers(ops: Ops, pace: Pace | None) -> dict[int, list[int]]:
    """To three questions in two rows."""
    prompts = ([3, 4, 5] * 6, [7], [9, 8])
    asked = [Question(prompt, (0.0, 0.9)[tag % 2], tag) for tag, prompt in enumerate(prompts)]
    target = lockstep(load(ops, **SMALL), ops, rows=2, max_new_tokens=3, pace=pace)
    return by_tag(target.answers(asking(asked)))


@pytest.mark.usefixtures("poisoned_memory")
def test_padded_prompts_and_rows_without_answers_change_nothing(reference_ops: Ops) -> None:
    assert answers(triton_ops(torch.float32), PADDED) == answers(reference_ops, None)
