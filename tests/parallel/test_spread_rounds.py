"""Decode rounds of several ranks give the texts of one rank whose steps go through the host."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine.runner.model_runner import ModelRunner
from engine.runner.rounds import Rounds, RoundSettings

from configs.load import load_config
from configs.resolve import HostFacts, ResolvedConfig, resolve_host, with_sizes
from engine.checkpoints.checkpoint import open_checkpoint
from engine.checkpoints.source import resolve_source
from engine.models.llama import LlamaLoader
from engine.models.place import Place
from engine.parallel.shard import Shard
from engine.speculation.planner import FixedPlanner
from engine.step.group import TPGroup
from engine.step.shape import ROOT, DynamicShape, StaticShape, TreeShape, chain
from kernels.ops import Ops
from server.assembly.compose import assemble
from server.assembly.drafting import HeadLoader, Target, drafting_with
from server.assembly.rank import runner_parts
from tests.support.engines import ask, generate
from tests.support.thread_group import run_ranks
from tests.support.tiny_heads import write_tiny_head
from tests.support.tiny_llama import TinyLlama, write_tiny_llama

CPU = torch.device("cpu")
SHAPES: list[TreeShape] = [
    ROOT,
    chain(3),
    StaticShape("tree", (-1, 0, 0, 1, 1, 2)),
    DynamicShape("dynamic", 8, 3, 3),
]
SETTINGS: list[dict[str, object]] = [
    {},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_k": 12, "top_p": 0.8},
    {"temperature": 1.0, "frequency_penalty": 0.5},  # through the host
    {"max_tokens": 5, "logprobs": 1},
]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ResolvedConfig:
    """Four query heads and two KV heads: two ranks cut both, four ranks share KV heads."""
    base = tmp_path_factory.mktemp("rounds")
    spec = TinyLlama(num_heads=4, num_kv_heads=2, intermediate_size=96, vocab_size=389)
    (base / "model").mkdir()
    write_tiny_llama(base / "model", spec)
    head = write_tiny_head(base / "head", spec, draft_vocab=61, num_layers=1)
    settings = [
        f"model.source={base / 'model'}",
        f"speculation.draft={head}",
        "model.dtype=float32",
        "scheduler.max_num_seqs=6",
        "scheduler.max_num_batched_tokens=160",
        "speculation.lookup=false",
    ]
    config = resolve_host(load_config(None, settings), HostFacts(1, base))
    return with_sizes(config, max_model_len=128, num_blocks=64)


def texts(
    config: ResolvedConfig, ops: Ops, group: TPGroup, shape: TreeShape, *, rounds: bool
) -> tuple[dict[str, list[int]], int]:
    """What this rank says, and how many drafts were accepted."""
    assert config.speculation.draft is not None
    place = Place(ops, torch.float32, CPU, Shard(group.rank, group.size), group)
    checkpoint = open_checkpoint(resolve_source(config.model.source))
    model = LlamaLoader(checkpoint.arch, checkpoint.stored, place, 128).load()
    target = Target(model, checkpoint.arch, frozenset(checkpoint.eos_token_ids))
    draft = HeadLoader(target, place, 128).load(Path(config.speculation.draft))
    drafting = drafting_with(config, draft, place)
    core = assemble(config, target, place, replace(drafting, planner=FixedPlanner(shape)))
    parts = runner_parts(config, target, place, drafting.proposer)
    round_settings = RoundSettings(6, graphs=False) if rounds else None
    core.executor = ModelRunner(replace(parts, rounds=round_settings))
    requests = [
        ask(f"{at}", [5 + at, 9, 200 + at, 7], **({"max_tokens": 16, "seed": at} | kind))
        for at, kind in enumerate(SETTINGS)
    ]
    heard = generate(core, requests[:3]) | generate(core, requests[3:])
    return {name: done.token_ids for name, done in heard.items()}, core.stats().num_draft_tokens


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_rounds_of_several_ranks_say_what_one_rank_says(
    config: ResolvedConfig,
    reference_ops: Ops,
    size: int,
    shape: TreeShape,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected, num_drafted = texts(config, reference_ops, TPGroup(), shape, rounds=False)
    assert (num_drafted > 0) == (shape is not ROOT)
    launch, count = Rounds.launch, []

    def noting(self: Rounds, *args: object) -> object:
        count.append(1)
        return launch(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Rounds, "launch", noting)
    for found, _ in run_ranks(
        size, lambda group: texts(config, reference_ops, group, shape, rounds=True)
    ):
        assert found == expected
    assert len(count) > 4 * size
