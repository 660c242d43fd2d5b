"""Logits are made a few rows at a time, which changes no text and no log-probability."""

from __future__ import annotations

import logging
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.completion import Completion
from engine.kv import sizing
from engine.models.footprint import step_bytes
from engine.models.llama import Llama
from engine.request import Request
from engine.runner.measuring import run_largest
from engine.speculation.planner import FixedPlanner
from engine.step import batch
from kernels.ops import Ops
from tests.support.engines.in_process import ask, generate
from tests.support.engines.tiny_engine import TinyEngine, random_llama
from tests.support.heads.head_lab import SHAPES, HeadLab, write_head

MOST = 5  # rows


def requests() -> list[Request]:
    kinds: list[dict[str, Any]] = [
        {"logprobs": 2, "temperature": 0.9, "presence_penalty": 0.7},
        {"prompt_logprobs": 1, "logprobs": 0},
        {"temperature": 1.1, "top_p": 0.8, "logit_bias": {9: 2.0}},
    ]
    return [
        ask(f"{at}", list(range(5, 14 + at)), max_tokens=8, seed=at, **kind)
        for at, kind in enumerate(kinds)
    ]


@pytest.fixture(scope="module")
def lab(native_ops: Ops, tmp_path_factory: pytest.TempPathFactory) -> HeadLab:
    engine = TinyEngine(random_llama(), native_ops, max_model_len=64)
    return HeadLab(engine, write_head(engine, tmp_path_factory.mktemp("head") / "eagle3"))


def answers(lab: HeadLab) -> dict[str, Completion]:
    return generate(lab.build(FixedPlanner(SHAPES["tree"]))[0], requests())


@pytest.mark.parametrize("padded", [False, True], ids=["exact", "padded"])
def test_answers_do_not_depend_on_the_rows_of_logits_at_a_time(
    lab: HeadLab, padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = replace(lab, engine=replace(lab.engine, padded=padded))
    whole = answers(lab)
    rows: list[int] = []
    logits = Llama.logits

    def noted(self: Llama, hidden: Tensor, context: Any) -> Tensor:
        rows.append(len(hidden))
        return logits(self, hidden, context)

    monkeypatch.setattr(Llama, "logits", noted)
    monkeypatch.setattr(batch, "LOGIT_ROWS", MOST)
    found = answers(lab)
    assert max(rows) == MOST
    for name, record in whole.items():
        assert found[name].token_ids == record.token_ids
        assert found[name].logprobs == record.logprobs
        assert found[name].prompt_logprobs == record.prompt_logprobs


def test_the_largest_step_runs_and_leaves_nothing_behind(lab: HeadLab) -> None:
    core = lab.engine.build()
    run_largest(core._executor, 33, 16)
    assert answers(lab)["2"].token_ids == generate(core, requests())["2"].token_ids


@pytest.mark.parametrize(("used", "level"), [(2**20, "INFO"), (2**30, "WARNING")])
def test_the_largest_step_is_measured_once_against_what_is_kept_for_it(
    used: int, level: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    held = [100]
    device = SimpleNamespace(
        reset_peak_memory_stats=lambda device: None,
        memory_allocated=lambda device: held[0],
        max_memory_allocated=lambda device: held[0] + used,
        synchronize=lambda device: None,
    )
    monkeypatch.setattr(sizing.torch, "cuda", device)
    ran: list[int] = []
    with caplog.at_level(logging.INFO):
        sizing.check_reserve(lambda: ran.append(1), 2**25, torch.device("cuda", 0))
        sizing.check_reserve(lambda: ran.append(2), 2**25, torch.device("cpu"))
    assert ran == [1]
    assert [record.levelname for record in caplog.records] == [level]
    assert "32 MiB are kept" in caplog.text


def test_what_is_kept_for_a_step_grows_with_its_parts(lab: HeadLab) -> None:
    arch = lab._arch
    least = step_bytes(arch, 1, torch.float32, 1, 16)
    assert step_bytes(arch, 1, torch.float32, 1, 160) > least
    assert step_bytes(replace(arch, vocab_size=1000), 1, torch.float32, 1, 16) > least
    assert step_bytes(arch, 1, torch.float32, 64, 16) == least + 63 * arch.vocab_size * 4
