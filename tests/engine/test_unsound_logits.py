"""A request whose logits are NaN or infinite ends with an error; the others do not notice."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from engine.completion import Completion
from engine.core import EngineCore
from engine.models.llama import Llama
from engine.request import FinishReason, Request
from engine.speculation.planner import FixedPlanner
from kernels.ops import Ops
from tests.support.engines.in_process import ask, generate
from tests.support.engines.tiny_engine import TinyEngine, random_llama
from tests.support.heads.head_lab import SHAPES, HeadLab, write_head

BROKEN = 100  # a token whose embedding is NaN
WAYS: dict[str, dict[str, Any]] = {
    "exact": {},
    "padded": {"padded": True},
    "ahead": {"padded": True, "run_ahead": True},
}


@pytest.fixture(scope="module")
def lab(native_ops: Ops, tmp_path_factory: pytest.TempPathFactory) -> HeadLab:
    oracle = random_llama()
    engine = TinyEngine(oracle, native_ops, max_model_len=128)
    head = write_head(engine, tmp_path_factory.mktemp("head") / "eagle3")
    with torch.no_grad():
        oracle.get_input_embeddings().weight[BROKEN] = torch.nan
    return HeadLab(engine, head)


def mates() -> list[Request]:
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0, "seed": 3, "logprobs": 1},
        {"temperature": 0.8, "seed": 4, "top_p": 0.8},
    ]
    return [
        ask(f"mate{at}", list(range(5, 12 + at)), logit_bias={BROKEN: -100.0}, **kind)
        for at, kind in enumerate(kinds)
    ]


def broken() -> list[Request]:
    prompt = [5, 6, BROKEN, 7, 8]
    return [
        ask("greedy", prompt),
        ask("sampled", prompt, temperature=0.9, logprobs=2),
        ask("scored", prompt, prompt_logprobs=1, max_tokens=0),
        ask("later", [9, 9, 4], logit_bias={BROKEN: 100.0}),  # its own first token breaks it
    ]


def texts(heard: dict[str, Completion], of: list[Request]) -> list[list[int]]:
    return [heard[request.request_id].token_ids for request in of]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", ["root", "tree"])
def test_only_the_broken_request_ends_with_an_error(lab: HeadLab, way: str, shape: str) -> None:
    expected = texts(generate(lab.engine.build(), mates()), mates())
    there = replace(lab, engine=replace(lab.engine, **WAYS[way]))
    core = _core(there, shape)
    heard = generate(core, mates() + broken())
    assert texts(heard, mates()) == expected
    assert texts(heard, broken()) == [[], [], [], [BROKEN]]
    for request in broken():
        finished = heard[request.request_id].finished
        assert finished is not None
        assert finished.reason is FinishReason.ERROR
        assert "NaN" in (finished.error or "")
    assert core.stats().num_unsound == 4


def _core(lab: HeadLab, shape: str) -> EngineCore:
    return lab.engine.build() if shape == "root" else lab.build(FixedPlanner(SHAPES[shape]))[0]


def test_no_prompt_finds_blocks_of_a_broken_request(
    lab: HeadLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = list(range(5, 75))
    truth = generate(lab.engine.build(), [ask("a", prompt)])["a"].token_ids
    core = replace(lab.engine, max_num_batched_tokens=32).build()
    forward = Llama.forward
    with monkeypatch.context() as patch:
        patch.setattr(Llama, "forward", lambda *given: forward(*given) * torch.nan)
        first = generate(core, [ask("a", prompt)])["a"]
    assert first.finished is not None
    assert first.finished.reason is FinishReason.ERROR
    again = generate(core, [ask("b", prompt)])["b"]
    assert again.token_ids == truth
    assert core.stats().prefix_hits == 0


@pytest.mark.parametrize(
    ("row", "sound"),
    [
        ([1.0, 2.0, 3.0], True),
        ([1.0, -torch.inf, -torch.inf], True),
        ([1.0, torch.nan, 3.0], False),
        ([1.0, torch.inf, 3.0], False),
        ([-torch.inf] * 3, False),
        ([torch.nan] * 3, False),
    ],
)
@pytest.mark.parametrize("table", ["reference_ops", "native_ops"])
@pytest.mark.parametrize("width", [3, 40], ids=["a few", "more than a register"])
def test_a_sound_row_has_a_finite_best_and_no_nan(
    request: pytest.FixtureRequest, table: str, width: int, row: list[float], sound: bool
) -> None:
    ops = request.getfixturevalue(table)
    rows = torch.full((2, width), -torch.inf)
    rows[0], rows[1, :3] = 1.0, torch.tensor(row)
    assert ops.are_sound(rows).tolist() == ops.are_sound(rows.flip(1)).tolist() == [True, sound]
