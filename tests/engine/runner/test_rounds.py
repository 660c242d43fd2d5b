"""Decode rounds in one go on the device give what steps through the host give."""

from __future__ import annotations

import logging
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from configs.schema import (
    Config,
    KernelsConfig,
    ParallelConfig,
    SchedulerConfig,
    SpeculationConfig,
)
from engine.core import EngineCore
from engine.parallel.shard import WHOLE
from engine.request import Request
from engine.runner.rounds import Rounds, RoundSettings, row_counts
from engine.speculation.planner import FixedPlanner
from engine.step.group import TPGroup
from engine.step.plan import RowPlan
from engine.step.shape import ROOT, TreeShape, chain
from kernels.ops import Ops
from server.assembly.compose import looks_up, runs_ahead
from server.assembly.rank import Place, round_settings
from tests.support import pretend_device
from tests.support.engines import ask, generate
from tests.support.head_lab import SHAPES, HeadLab, write_head
from tests.support.pretend_device import PretendDevice
from tests.support.scripted_proposer import CyclingPlanner
from tests.support.tiny_engine import TinyEngine, random_llama

pytestmark = pytest.mark.usefixtures("one_thread")
MAX_LEN = 128


def requests() -> list[Request]:
    """Rows of every kind that rounds take, and some that they leave to the host."""
    shared = [(7 * i) % 120 + 3 for i in range(40)]
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0, "max_tokens": 41},
        {"temperature": 0.8, "top_k": 12, "top_p": 0.8, "min_p": 0.01},
        {"temperature": 1.2, "max_tokens": 40, "min_tokens": 6},
        {"temperature": 1.0, "top_p": 0.6},
        {"max_tokens": 3},
        {"temperature": 0.9, "presence_penalty": 0.5, "max_tokens": 4},
        {"logprobs": 2, "max_tokens": 5},
    ]
    return [
        ask(f"{at}", shared[: 3 + 5 * at], **({"max_tokens": 33, "seed": at} | kind))
        for at, kind in enumerate(kinds)
    ] + [ask("long", shared * 3, max_tokens=50, seed=99, temperature=1.0)]  # to the last position


def texts_of(core: EngineCore, only: slice = slice(None)) -> dict[str, list[int]]:
    heard = generate(core, requests()[only], per_step=2)
    return {name: record.token_ids for name, record in heard.items()}


@pytest.fixture
def rounds_run(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Forms of the rounds that were run."""
    forms: list[Any] = []
    launch = Rounds.launch

    def noting(self: Rounds, plan: Any, states: Any, planned: Any) -> Any:
        forms.append(planned.form)
        return launch(self, plan, states, planned)

    monkeypatch.setattr(Rounds, "launch", noting)
    return forms


@pytest.fixture(scope="module")
def lab(native_ops: Ops, tmp_path_factory: pytest.TempPathFactory) -> HeadLab:
    engine = TinyEngine(random_llama(), native_ops, max_model_len=MAX_LEN)
    return HeadLab(engine, write_head(engine, tmp_path_factory.mktemp("head") / "eagle3"))


@pytest.fixture(scope="module")
def plain(lab: HeadLab) -> dict[str, list[int]]:
    return texts_of(lab.engine.build())


def with_rounds(lab: HeadLab, **changes: Any) -> HeadLab:
    return replace(lab, engine=replace(lab.engine, rounds=True, **changes))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_texts_and_drafts_are_those_of_steps_through_the_host(
    lab: HeadLab, plain: dict[str, list[int]], shape: TreeShape, rounds_run: list[Any]
) -> None:
    usual, _ = lab.build(FixedPlanner(shape))
    assert texts_of(usual) == plain
    assert not rounds_run
    core, proposer = with_rounds(lab).build(FixedPlanner(shape))
    assert texts_of(core) == plain
    assert proposer.num_faults == 0
    assert not proposer.failed
    assert {form.shape for form in rounds_run} >= {shape}
    before, now = usual.stats(), core.stats()
    for name in ("num_steps", "num_drafts", "num_draft_tokens", "num_accepted_tokens"):
        assert getattr(now, name) == getattr(before, name), name


@pytest.mark.parametrize(
    "changes",
    [
        {"max_num_batched_tokens": 17, "max_num_seqs": 3},
        {"num_blocks": 11},
        {"prefix_caching": False, "max_num_seqs": 6},
    ],
    ids=["chunked", "preempted", "six-rows"],
)
def test_changing_shapes_company_and_memory_do_not_show(
    lab: HeadLab, plain: dict[str, list[int]], changes: dict[str, Any], rounds_run: list[Any]
) -> None:
    shapes = (*SHAPES.values(), chain(1), ROOT)
    core, _ = with_rounds(lab, **changes).build(CyclingPlanner(shapes))
    assert texts_of(core) == plain
    assert len(rounds_run) > 20
    if "num_blocks" in changes:
        assert core.stats().num_preemptions > 0


def test_without_a_head_rounds_decode_too(
    lab: HeadLab, plain: dict[str, list[int]], rounds_run: list[Any]
) -> None:
    assert texts_of(with_rounds(lab).engine.build()) == plain
    assert {form.shape for form in rounds_run} == {ROOT}


def test_a_head_that_gives_nan_costs_speed_only(
    lab: HeadLab,
    plain: dict[str, list[int]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    rounds_run: list[Any],
) -> None:
    core, proposer = with_rounds(lab).build(FixedPlanner(SHAPES["tree"]))
    forward = type(proposer._head).forward
    monkeypatch.setattr(
        type(proposer._head), "forward", lambda *a: torch.full_like(forward(*a), torch.nan)
    )
    with caplog.at_level(logging.WARNING):
        assert texts_of(core) == plain
    assert core.stats().num_drafts == 0
    assert SHAPES["tree"] in {form.shape for form in rounds_run}
    assert proposer.num_faults == core.stats().num_draft_faults > 0
    assert len([r for r in caplog.records if "not finite" in r.message]) == 1


def on_pretended_device(lab: HeadLab) -> HeadLab:
    ops = pretend_device.operations_of(lab.engine.ops)
    return replace(lab, engine=replace(lab.engine, ops=ops, device=pretend_device.DEVICE))


@pytest.mark.parametrize("shape", [SHAPES["tree"], SHAPES["dynamic"]], ids=lambda s: s.name)
def test_an_engine_keeps_to_its_device(
    lab: HeadLab, plain: dict[str, list[int]], shape: TreeShape, rounds_run: list[Any]
) -> None:
    with torch.inference_mode(), PretendDevice():
        core, proposer = on_pretended_device(lab).build(FixedPlanner(shape))
        texts = texts_of(core, slice(2, 8))  # the others hold nothing new
    assert texts == {name: plain[name] for name in texts}
    assert rounds_run
    assert not proposer.failed


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_a_round_is_one_copy_each_way_and_no_wait(lab: HeadLab, shape: TreeShape) -> None:
    """The second and later rounds of a form: the first makes its buffers."""
    counts = []
    launch = Rounds.launch
    with torch.inference_mode(), PretendDevice() as device, pytest.MonkeyPatch.context() as patch:

        def counting(self: Rounds, plan: Any, states: Any, planned: Any) -> Any:
            before = (device.uploads, device.downloads, len(device.waits))
            flying = launch(self, plan, states, planned)
            after = (device.uploads, device.downloads, len(device.waits))
            counts.append((planned.form, tuple(b - a for a, b in zip(before, after, strict=True))))
            return flying

        patch.setattr(Rounds, "launch", counting)
        core, _ = on_pretended_device(lab).build(FixedPlanner(shape))
        generate(core, [ask("a", [3, 4, 5], max_tokens=30, seed=1, temperature=1.0)])
    again = [count for at, (form, count) in enumerate(counts) if (form in dict(counts[:at]))]
    assert len(again) > 3
    assert set(again) == {(1, 1, 0)}


def test_the_pretended_device_sees_what_must_not_be() -> None:
    with PretendDevice() as device:
        there, here = torch.ones(3).to(pretend_device.DEVICE), torch.ones(3)
        with pytest.raises(RuntimeError, match="of the host and of the device"):
            there + here
        assert device.uploads == 1
        assert device.downloads == 0
        there[there > 0]
        assert bool((there > 0).all())
        assert there.cpu().tolist() == [1, 1, 1]
        assert (device.uploads, device.downloads, len(device.waits)) == (1, 1, 2)


@pytest.mark.parametrize("seed", range(4))
def test_block_tables_on_the_device_follow_the_plans(lab: HeadLab, seed: int) -> None:
    """Blocks from the root's on may be others in the next plan; more can be new than fit."""
    rng = random.Random(seed)
    rounds = with_rounds(lab).engine.build().executor._rounds  # type: ignore[attr-defined]
    lines, starts = np.array([3, 0, 7]), [0, 0, 0]
    tables, ids = rounds._tables, [[0] * 8, [0] * 8, [0] * 8]
    for _ in range(20):
        if rng.random() < 0.2:
            rounds.admit(0)
            starts[1] = 0
        for row, start in enumerate(starts):
            first = start // 16
            ids[row][first:] = [rng.randrange(128) for _ in range(8 - first)]
        rows = [
            RowPlan("", start, [5], blocks[: start // 16 + rng.randint(1, 3)], samples=True)
            for start, blocks in zip(starts, ids, strict=True)
        ]
        places, blocks = rounds._new_blocks(rows, lines, room=4)
        tables.view(-1)[torch.from_numpy(places)] = torch.from_numpy(blocks)
        for row, line in zip(rows, lines.tolist(), strict=True):
            assert tables[line, : len(row.block_ids)].tolist() == row.block_ids
        assert (tables[-1] == rounds._scratch.block).all()
        starts = [min(start + rng.randint(0, 20), 127) for start in starts]


def test_graphs_are_for_triton_kernels_on_cuda_devices(reference_ops: Ops) -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    triton = replace(reference_ops, backends={"attention": "triton"})
    off = Config(kernels=KernelsConfig(graphs="off"))
    one, graphed = TPGroup(), Place(TPGroup(), WHOLE, gpu, triton)
    eager = RoundSettings(64, graphs=False)
    assert round_settings(Config(), graphed) == RoundSettings(64, graphs=True)
    assert round_settings(off, graphed) == eager
    assert round_settings(Config(), Place(one, WHOLE, gpu, reference_ops)) == eager
    assert round_settings(Config(), Place(one, WHOLE, cpu, triton)) is None
    assert not looks_up(Config(), graphed)
    assert looks_up(off, graphed)
    assert looks_up(Config(speculation=SpeculationConfig(lookup=True)), graphed)


def test_running_ahead_is_for_graphs_of_one_rank_or_an_error(reference_ops: Ops) -> None:
    triton = replace(reference_ops, backends={"attention": "triton"})
    gpu = Place(TPGroup(), WHOLE, torch.device("cuda"), triton)
    cpu = replace(gpu, device=torch.device("cpu"))
    off = KernelsConfig(graphs="off")
    lookup, no_lookup = SpeculationConfig(lookup=True), SpeculationConfig(lookup=False)
    on, never = SchedulerConfig(run_ahead=True), SchedulerConfig(run_ahead=False)
    two = ParallelConfig(tensor=2)
    assert runs_ahead(Config(), gpu)
    assert runs_ahead(Config(scheduler=on, kernels=off, speculation=no_lookup), gpu)
    for config in (
        Config(scheduler=never),
        Config(kernels=off, speculation=no_lookup),
        Config(speculation=lookup),
        Config(parallel=two),
    ):
        assert not runs_ahead(config, gpu)
    assert not runs_ahead(Config(), cpu)
    for config, place, reason in (
        (Config(scheduler=on), cpu, "on a CPU go through the host"),
        (Config(scheduler=on, parallel=two), gpu, "parallel.tensor is more than 1"),
        (Config(scheduler=on, speculation=lookup), gpu, "lookup is on"),
    ):
        with pytest.raises(ValueError, match=f"scheduler.run_ahead is true, but .*{reason}"):
            runs_ahead(config, place)


def test_rows_are_padded_to_few_numbers() -> None:
    assert row_counts(64) == (1, 2, 4, 8, 16, 32, 64)
    assert row_counts(1) == (1,)
    assert row_counts(5) == (1, 2, 4, 5)
