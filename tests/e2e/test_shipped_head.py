"""The shipped head of the bundled model: its drafts are accepted, and no token of any text depends
on it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet

from configs.load import load_config
from drafter.train.data.conversations import read_prompts
from engine.request import Request
from engine.speculation.planner import FixedPlanner
from server.assembly.drafting import tree_shape
from server.assembly.heads.evaluation import sample_prompts
from server.assembly.offline import OfflineEngine
from server.text.chat_codec import load_codec
from tests.support.configurations import hosted
from tests.support.engines.in_process import ask
from tests.support.machine.threads import own_torch_threads

NUM_PROMPTS, NUM_TOKENS = 8, 48


@pytest.fixture(scope="module")
def engine(native_cache: Path) -> Iterator[OfflineEngine]:
    settings = ["speculation.tree=root", "cache.num_blocks=512", f"files.dir={native_cache}"]
    with own_torch_threads():
        yield OfflineEngine.from_config(load_config(None, settings))


@pytest.fixture(scope="module")
def prompts(native_cache: Path) -> list[list[int]]:
    codec = load_codec(hosted(load_config(None, [f"files.dir={native_cache}"])))
    found = list(read_prompts(sample_prompts()))[:NUM_PROMPTS]
    return [codec.encode(list(prompt.messages), True) for prompt in found]


def texts(engine: OfflineEngine, prompts: list[list[int]], tree: str, heat: float) -> list[object]:
    """Token ids of all prompts, drafted in the shape `tree`."""
    policy = replace(engine.core.policy, planner=FixedPlanner(tree_shape(tree)))
    engine.core.draft_with(policy)
    requests: list[Request] = [
        ask(f"{tree}-{heat}-{i}", ids, max_tokens=NUM_TOKENS, temperature=heat, seed=i)
        for i, ids in enumerate(prompts)
    ]
    done = engine.generate(requests)
    return [done[request.request_id].token_ids for request in requests]


@pytest.fixture(scope="module")
def plain(engine: OfflineEngine, prompts: list[list[int]]) -> dict[float, list[object]]:
    """The texts of plain decoding, by temperature."""
    return {heat: texts(engine, prompts, "root", heat) for heat in (0.0, 1.0)}


def cases() -> Iterator[ParameterSet]:
    """Every tree, greedy and sampled. Every run takes each kind of tree and each heat."""
    always = {("chain3", 1.0), ("chain5", 0.0), ("tree8", 1.0), ("dynamic16", 0.0)}
    for tree in ("chain3", "chain5", "tree4", "tree8", "tree16", "dynamic16"):
        for heat in (0.0, 1.0):
            marks = () if (tree, heat) in always else (pytest.mark.extended,)
            yield pytest.param(tree, heat, id=f"{tree}-{heat:g}", marks=marks)


@pytest.mark.parametrize(("tree", "heat"), list(cases()))
def test_accepted_drafts_leave_every_text_as_it_was(
    engine: OfflineEngine,
    prompts: list[list[int]],
    plain: dict[float, list[object]],
    tree: str,
    heat: float,
) -> None:
    before = engine.core.stats()
    assert texts(engine, prompts, tree, heat) == plain[heat]
    after = engine.core.stats()
    drafts = after.num_drafts - before.num_drafts
    accepted = (after.num_accepted_tokens - before.num_accepted_tokens) / drafts
    assert accepted > (0.3 if tree.startswith("chain") else 0.4)
