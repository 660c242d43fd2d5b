"""Padded steps, as on a GPU, give the same results as steps of exact sizes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
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
from engine.models.place import Place
from engine.request import Request
from engine.runner.forms import StepForm, row_counts
from engine.runner.graphs import DeviceSteps
from engine.runner.runner import ModelRunner, StepSettings
from engine.speculation.planner import FixedPlanner
from engine.speculation.proposer import Drafted, DraftLimits, RootProposer, Roots
from engine.step.plan import Admission, RowPlan, StepPlan
from engine.step.shape import ROOT, TreeShape, chain
from kernels.ops import Backend, Ops
from server.assembly.compose import runs_ahead
from server.assembly.drafting import Drafting
from server.assembly.ranks.rank import step_settings
from tests.support.drafts.scripted_proposer import CyclingPlanner
from tests.support.engines.in_process import ask, generate
from tests.support.engines.tiny_engine import TinyEngine, random_llama
from tests.support.extended import diagonal
from tests.support.heads.head_lab import SHAPES, HeadLab, write_head
from tests.support.machine import pretend_device
from tests.support.machine.pretend_device import PretendDevice

MAX_LEN = 128


def requests() -> list[Request]:
    """Rows of every kind."""
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


def admission(line: int) -> Admission:
    return Admission(line, ask("a", [5], max_tokens=9))


def with_blocks(row: RowPlan, first: int, blocks: tuple[int, ...]) -> RowPlan:
    """The line's next row, at position 1, with new blocks after its first `first` ones."""
    return msgspec.structs.replace(row, start=1, first_block=first, new_blocks=blocks)


def texts_of(core: EngineCore, only: slice = slice(None)) -> dict[str, list[int]]:
    heard = generate(core, requests()[only], per_step=2)
    return {name: record.token_ids for name, record in heard.items()}


@pytest.fixture
def forms(monkeypatch: pytest.MonkeyPatch) -> list[StepForm]:
    """The forms of the padded steps that ran."""
    seen: list[StepForm] = []
    launch = DeviceSteps.launch

    def noting(self: DeviceSteps, inputs: Any, form: StepForm, laps: Any) -> Any:
        seen.append(form)
        return launch(self, inputs, form, laps)

    monkeypatch.setattr(DeviceSteps, "launch", noting)
    return seen


@pytest.fixture(scope="module")
def lab(native_ops: Ops, tmp_path_factory: pytest.TempPathFactory) -> HeadLab:
    engine = TinyEngine(random_llama(), native_ops, max_model_len=MAX_LEN)
    return HeadLab(engine, write_head(engine, tmp_path_factory.mktemp("head") / "eagle3"))


@pytest.fixture(scope="module")
def plain(lab: HeadLab) -> dict[str, list[int]]:
    return texts_of(lab.engine.build())


def padded(lab: HeadLab, **changes: Any) -> HeadLab:
    return replace(lab, engine=replace(lab.engine, padded=True, **changes))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_texts_and_drafts_are_those_of_exact_steps(
    lab: HeadLab, plain: dict[str, list[int]], shape: TreeShape, forms: list[StepForm]
) -> None:
    usual, _ = lab.build(FixedPlanner(shape))
    assert texts_of(usual) == plain
    assert not forms
    core, proposer = padded(lab).build(FixedPlanner(shape))
    assert texts_of(core) == plain
    assert core.stats().num_draft_faults == 0
    assert not proposer.failed
    assert {form.shape for form in forms} >= {shape, ROOT}
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
def test_changing_shapes_batches_and_memory_do_not_change_texts(
    lab: HeadLab, plain: dict[str, list[int]], changes: dict[str, Any], forms: list[StepForm]
) -> None:
    shapes = (*SHAPES.values(), chain(1), ROOT)
    core, _ = padded(lab, **changes).build(CyclingPlanner(shapes))
    assert texts_of(core) == plain
    assert len(forms) > 20
    if "num_blocks" in changes:
        assert core.stats().num_preemptions > 0


def test_without_a_head_padded_steps_decode_too(
    lab: HeadLab, plain: dict[str, list[int]], forms: list[StepForm]
) -> None:
    assert texts_of(padded(lab).engine.build()) == plain
    assert {form.shape for form in forms} == {ROOT}


def test_a_head_that_gives_nan_costs_speed_only(
    lab: HeadLab,
    plain: dict[str, list[int]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    forms: list[StepForm],
) -> None:
    core, proposer = padded(lab).build(FixedPlanner(SHAPES["tree"]))
    forward = type(proposer._head).forward
    monkeypatch.setattr(
        type(proposer._head), "forward", lambda *a: torch.full_like(forward(*a), torch.nan)
    )
    with caplog.at_level(logging.WARNING):
        assert texts_of(core) == plain
    assert core.stats().num_drafts == 0
    assert SHAPES["tree"] in {form.shape for form in forms}
    assert core.stats().num_draft_faults > 0
    assert len([r for r in caplog.records if "not finite" in r.message]) == 1


def on_pretended_device(lab: HeadLab) -> HeadLab:
    ops = pretend_device.operations_of(lab.engine.ops)
    return replace(lab, engine=replace(lab.engine, ops=ops, device=pretend_device.DEVICE))


@pytest.mark.parametrize("shape", [SHAPES["tree"], SHAPES["dynamic"]], ids=lambda s: s.name)
def test_an_engine_keeps_to_its_device(
    lab: HeadLab, plain: dict[str, list[int]], shape: TreeShape, forms: list[StepForm]
) -> None:
    with torch.inference_mode(), PretendDevice():
        core, proposer = on_pretended_device(lab).build(FixedPlanner(shape))
        texts = texts_of(core, slice(2, 8))  # the others hold nothing new
    assert texts == {name: plain[name] for name in texts}
    assert forms
    assert not proposer.failed


REPEATING = [5, 6, 7, 8, 9, 10] * 4
PLAIN = ask("a", [3, 4, 5], max_tokens=14, seed=1, temperature=1.0)


@pytest.mark.parametrize(
    ("shape", "request_"),
    [
        *((shape, PLAIN) for shape in SHAPES.values()),
        (SHAPES["tree"], ask("penalised", [3, 4, 5], max_tokens=14, presence_penalty=1.0)),
        (SHAPES["tree"], ask("biased", [3, 4, 5], max_tokens=14, logit_bias={7: 3.0})),
        (SHAPES["chain3"], ask("held back", [3, 4, 5], max_tokens=14, min_tokens=14)),
        (SHAPES["tree"], ask("scored", [3, 4, 5], max_tokens=14, logprobs=4)),
        (ROOT, ask("looked up", REPEATING, max_tokens=40, ignore_eos=True)),
        (SHAPES["tree"], ask("in chunks", REPEATING * 4, max_tokens=5, prompt_logprobs=1)),
    ],
    ids=lambda value: value.request_id if isinstance(value, Request) else value.name,
)
def test_a_step_is_one_copy_each_way_and_no_wait(
    lab: HeadLab, shape: TreeShape, request_: Request
) -> None:
    """From the second step of a form on: the first allocates its buffers."""
    counts = []
    lookup = request_.request_id == "looked up"
    budget = 20 if request_.request_id == "in chunks" else 64
    lab = replace(lab, engine=replace(lab.engine, lookup=lookup, max_num_batched_tokens=budget))
    launch = DeviceSteps.launch
    with torch.inference_mode(), PretendDevice() as device, pytest.MonkeyPatch.context() as patch:

        def counting(self: DeviceSteps, inputs: Any, form: StepForm, laps: Any) -> Any:
            before = (device.uploads, device.downloads, len(device.waits))
            outputs = launch(self, inputs, form, laps)
            after = (device.uploads, device.downloads, len(device.waits))
            counts.append((form, tuple(b - a for a, b in zip(before, after, strict=True))))
            return outputs

        patch.setattr(DeviceSteps, "launch", counting)
        core, _ = on_pretended_device(lab).build(FixedPlanner(shape))
        generate(core, [request_])
    again = [count for at, (form, count) in enumerate(counts) if (form in dict(counts[:at]))]
    assert len(again) > 3
    assert not lookup or any(form.num_known for form, _ in counts)
    assert set(again) == {(1, 1, 0)}


FEATURES: dict[str, dict[str, Any]] = {
    "penalties": {"presence_penalty": 0.5, "frequency_penalty": 0.3, "repetition_penalty": 1.2},
    "bias": {"logit_bias": {7: 5.0, 9: -100.0, 12: 2.0}},
    "min_tokens": {"min_tokens": 9, "ignore_eos": False},
    "logprobs": {"logprobs": 3},
    "named": {"logprobs": 2, "logprob_token_ids": (5, 90, 7)},
    "echo": {"prompt_logprobs": 2},
    "filters": {"top_k": 9, "top_p": 0.9, "min_p": 0.01},
}


def feature_requests(feature: str, max_tokens: int = 30) -> list[Request]:
    prompt = [(7 * i) % 120 + 3 for i in range(30)] * 2
    return [
        ask(
            f"{at}",
            prompt[: 9 + 17 * at],
            max_tokens=max_tokens,
            seed=at,
            temperature=(at + 1) % 2,
            **params,
        )
        for at, params in enumerate([FEATURES[feature], {}, FEATURES[feature]])
    ]


@pytest.mark.parametrize(("feature", "tree"), diagonal([*FEATURES], [*SHAPES]))
def test_every_feature_is_part_of_the_step(
    lab: HeadLab, feature: str, tree: str, forms: list[StepForm]
) -> None:
    """With neighbours that lack it and prompts in chunks; compares everything that clients get."""
    shape = SHAPES[tree]
    small = replace(lab, engine=replace(lab.engine, max_num_batched_tokens=24))
    usual, _ = small.build(FixedPlanner(shape))
    expected = generate(usual, feature_requests(feature), per_step=1)
    core, proposer = padded(small).build(FixedPlanner(shape))
    heard = generate(core, feature_requests(feature), per_step=1)
    assert not proposer.failed
    for name, record in heard.items():
        assert record.token_ids == expected[name].token_ids
        assert record.logprobs == expected[name].logprobs
        assert record.prompt_logprobs == expected[name].prompt_logprobs
    asked = {
        "penalties": lambda form: form.is_penalised,
        "bias": lambda form: form.num_bias > 0,
        "min_tokens": lambda form: form.num_bias > 0,
        "logprobs": lambda form: form.num_top >= 0,
        "named": lambda form: form.num_named > 0,
        "echo": lambda form: form.num_echo > 0,
        "filters": lambda form: form.is_filtered,
    }[feature]
    assert any(map(asked, forms))


@pytest.mark.parametrize("feature", FEATURES)
def test_features_keep_to_the_device(lab: HeadLab, feature: str) -> None:
    usual, _ = lab.build(FixedPlanner(SHAPES["tree"]))
    expected = generate(usual, feature_requests(feature, 14))
    with torch.inference_mode(), PretendDevice() as device:
        core, proposer = on_pretended_device(lab).build(FixedPlanner(SHAPES["tree"]))
        heard = generate(core, feature_requests(feature, 14))
    assert not proposer.failed
    assert device.waits == []
    assert {n: r.token_ids for n, r in heard.items()} == {
        n: r.token_ids for n, r in expected.items()
    }


@pytest.mark.parametrize("shape", [ROOT, SHAPES["tree"]], ids=lambda s: s.name)
def test_drafts_found_in_the_text_are_part_of_the_step(
    lab: HeadLab, shape: TreeShape, forms: list[StepForm]
) -> None:
    repeating = [5, 6, 7, 8, 9, 10] * 6
    asked = [
        ask(f"{at}", repeating[: 20 + at], max_tokens=40, seed=at, ignore_eos=True)
        for at in range(3)
    ]
    looking = replace(lab, engine=replace(lab.engine, lookup=True))
    expected = generate(lab.engine.build(), asked)
    core, _ = padded(looking).build(FixedPlanner(shape))
    heard = generate(core, asked)
    assert {n: r.token_ids for n, r in heard.items()} == {
        n: r.token_ids for n, r in expected.items()
    }
    assert any(form.num_known for form in forms)


@pytest.mark.parametrize("is_padded", [False, True], ids=["exact", "padded"])
def test_long_prompts_are_scored_part_by_part(
    lab: HeadLab, is_padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many tokens are scored together, and across the borders of rows."""
    asked = [
        ask("a", [(7 * i) % 120 + 3 for i in range(23)], max_tokens=2, prompt_logprobs=2),
        ask("b", [(5 * i) % 120 + 3 for i in range(31)], max_tokens=2, prompt_logprobs=1),
    ]
    expected = generate(lab.engine.build(), asked)
    monkeypatch.setattr("engine.step.batch.LOGIT_ROWS", 10)
    heard = generate((padded(lab) if is_padded else lab).engine.build(), asked)
    for name, record in heard.items():
        scores = record.prompt_logprobs or []
        assert scores == expected[name].prompt_logprobs
        assert [entry.token_id for entry in scores[1:] if entry is not None] == next(
            request.prompt_ids[1:] for request in asked if request.request_id == name
        )


@dataclass
class Noting(RootProposer):
    """Notes which rows may have a tree, and which sequences it is told of."""

    max_nodes: list[list[int]] = field(default_factory=list)
    admitted: list[list[int]] = field(default_factory=list)

    def admit(self, lines: Sequence[int]) -> None:
        self.admitted.append(sorted(lines))

    def draft(self, roots: Roots, shape: TreeShape, limits: DraftLimits) -> Drafted:
        self.max_nodes.append(roots.max_nodes.tolist())
        return super().draft(roots, shape, limits)


@pytest.mark.parametrize("is_padded", [False, True], ids=["exact", "padded"])
def test_a_proposer_is_asked_for_no_tree_where_the_draft_is_known(
    lab: HeadLab, is_padded: bool
) -> None:
    """Such a row has slots for its chain alone."""
    noting = Noting()
    built = (padded(lab) if is_padded else lab).engine
    runner = replace(built, drafting=Drafting(noting, FixedPlanner(chain(3)))).build()._executor
    assert isinstance(runner, ModelRunner)

    def row(line: int, num_draft: int, draft: tuple[int, ...] = ()) -> RowPlan:
        return RowPlan(
            line=line,
            start=0,
            token_ids=(5,),
            first_block=0,
            new_blocks=(line,),
            samples=True,
            num_draft=num_draft,
            draft=draft,
        )

    rows = (row(0, 2, (6, 7)), row(1, 3), row(2, 0))
    plan = StepPlan(rows=rows, admitted=tuple(map(admission, range(3))), shape=chain(3))
    outcome = runner.execute(plan)
    assert noting.max_nodes == [[1, 4, 1, 0] if is_padded else [1, 4, 1]]
    assert [row.num_draft for row in outcome.rows] == [2, 0, 0]


@dataclass
class Faulty(Noting):
    """Cannot grow any tree."""

    def draft(self, roots: Roots, shape: TreeShape, limits: DraftLimits) -> Drafted:
        return replace(super().draft(roots, shape, limits), faults=roots.max_nodes > 1)


def test_faults_are_counted_for_each_proposer_anew(lab: HeadLab) -> None:
    drafting = Drafting(Faulty(), FixedPlanner(chain(3)))
    runner = replace(lab.engine, drafting=drafting).build()._executor
    assert isinstance(runner, ModelRunner)
    row = RowPlan(
        line=0,
        start=0,
        token_ids=(5,),
        first_block=0,
        new_blocks=(3,),
        samples=True,
        num_draft=3,
    )
    first = StepPlan(rows=(row,), admitted=(admission(0),), shape=chain(3))
    again = msgspec.structs.replace(first, admitted=())
    assert [runner.execute(plan).draft_faults for plan in (first, again)] == [1, 2]
    runner.draft_with(Faulty())
    assert runner.execute(again).draft_faults == 1


def test_another_proposer_hears_of_the_rows_that_run(lab: HeadLab) -> None:
    noting = Noting()
    runner = lab.engine.build()._executor
    assert isinstance(runner, ModelRunner)
    runner.execute(StepPlan(admitted=tuple(map(admission, range(3)))))
    runner.execute(StepPlan(released=(1,)))
    runner.draft_with(noting)
    assert noting.admitted == [[0, 2]]


def test_the_pretended_device_sees_forbidden_operations() -> None:
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


def test_more_new_blocks_than_a_step_has_room_for_are_written_before_it(lab: HeadLab) -> None:
    runner = padded(lab).engine.build()._executor
    assert isinstance(runner, ModelRunner)
    row = RowPlan(
        line=3,
        start=0,
        token_ids=(5,),
        first_block=0,
        new_blocks=tuple(range(40, 52)),
        samples=True,
    )
    plan = StepPlan(rows=(row,), admitted=(admission(3),))
    runner.execute(plan)
    tables = runner._body.state.tables
    assert tables[3, :12].tolist() == list(range(40, 52))
    runner.execute(StepPlan(rows=(with_blocks(row, 10, (7,)),)))
    assert tables[3, :11].tolist() == [*range(40, 50), 7]
    assert (tables[-1] == runner._body.scratch.block).all()


def test_graphs_are_for_triton_kernels_on_cuda_devices(reference_ops: Ops) -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    triton = replace(reference_ops, backends={"attention": Backend("triton")})
    off = Config(kernels=KernelsConfig(graphs="off"))
    graphed = Place(triton, torch.bfloat16, gpu)
    eager = StepSettings(exact=False, graphs=False)
    assert step_settings(Config(), graphed) == StepSettings(exact=False, graphs=True)
    assert step_settings(off, graphed) == eager
    assert step_settings(Config(), replace(graphed, ops=reference_ops)) == eager
    assert step_settings(Config(), replace(graphed, device=cpu)) == StepSettings(exact=True)
    assert Config().speculation.looks_up
    assert not SpeculationConfig(lookup=False).looks_up


def test_running_ahead_is_for_graphs_or_asked_for() -> None:
    graphed, eager = StepSettings(exact=False, graphs=True), StepSettings(exact=False)
    cpu = StepSettings(exact=True)
    on, never = SchedulerConfig(run_ahead=True), SchedulerConfig(run_ahead=False)
    assert runs_ahead(Config(), graphed)
    assert runs_ahead(Config(scheduler=on), eager)
    assert runs_ahead(Config(parallel=ParallelConfig(tensor=2)), graphed)
    assert not runs_ahead(Config(scheduler=never), graphed)
    assert not runs_ahead(Config(), eager)
    assert not runs_ahead(Config(), cpu)
    with pytest.raises(ValueError, match=r"scheduler\.run_ahead is true, but a CPU"):
        runs_ahead(Config(scheduler=on), cpu)


def test_rows_are_padded_to_few_numbers() -> None:
    assert row_counts(64) == (1, 2, 4, 8, 16, 32, 64)
    assert row_counts(1) == (1,)
    assert row_counts(5) == (1, 2, 4, 5)
