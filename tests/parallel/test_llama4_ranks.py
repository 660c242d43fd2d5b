"""Two ranks, each with half of every expert's width or with half of the experts, give the texts of
one for a Llama 4."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from configs.load import load_config
from configs.resolve import HostConfig, HostFacts, resolve_host
from engine.completion import Completion
from engine.request import Request
from engine.speculation.planner import FixedPlanner
from engine.step.shape import TreeShape, chain
from tests.engine.test_engine_equality import prompt
from tests.support.engines.in_process import ask
from tests.support.heads.head_lab import SHAPES
from tests.support.heads.tiny_heads import write_tiny_llama4_head
from tests.support.machine.threads import own_torch_threads
from tests.support.models.tiny_llama4 import write_tiny_llama4
from tests.support.ranks.thread_ranks import EXACT, PADDED, Way, answer


@pytest.fixture(scope="module", autouse=True)
def _torch_threads() -> Iterator[None]:
    with own_torch_threads():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("llama4-ranks")
    (base / "model").mkdir()
    oracle = write_tiny_llama4(base / "model")
    write_tiny_llama4_head(base / "head", oracle)
    return base


def configure(folder: Path, head: str, experts: str = "tensor") -> HostConfig:
    settings = [
        f"parallel.experts={experts}",
        f"model.source={folder / 'model'}",
        f"speculation.draft={head}",
        "speculation.tree=root",
        "model.dtype=float32",
        "model.max_model_len=128",
        "kernels.backend=reference",
        "cache.num_blocks=64",
        "scheduler.max_num_seqs=4",
        "scheduler.max_num_batched_tokens=70",
    ]
    return resolve_host(load_config(None, settings), HostFacts(1, folder))


def requests() -> list[Request]:
    return [
        ask("greedy", prompt(50, 2), max_tokens=30, ignore_eos=True),
        ask("sampled", prompt(20, 3), max_tokens=30, temperature=0.8, seed=3, ignore_eos=True),
    ]


@pytest.fixture(scope="module")
def truth(folder: Path) -> dict[str, Completion]:
    """The texts of one rank without drafts."""
    return answer(configure(folder, "null"), Way(), requests(), FixedPlanner()).texts


@pytest.mark.parametrize(
    ("way", "tree", "experts"),
    [
        (Way(2, EXACT, lookup=True), chain(3), "tensor"),
        (Way(2, PADDED, run_ahead=True), SHAPES["tree"], "tensor"),
        (Way(2, EXACT), SHAPES["tree"], "expert"),
    ],
    ids=["exact", "padded-ahead", "whole-experts"],
)
def test_two_ranks_that_draft_give_the_texts_of_one(
    folder: Path, truth: dict[str, Completion], way: Way, tree: TreeShape, experts: str
) -> None:
    config = configure(folder, str(folder / "head"), experts)
    heard = answer(config, way, requests(), FixedPlanner(tree))
    assert heard.stats.num_drafts > 0
    for name, record in truth.items():
        assert heard.texts[name].token_ids == record.token_ids, name
