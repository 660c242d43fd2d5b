"""Steps launched before the outcome of the last one is known give the texts of ordinary steps."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from engine import copies as transfer
from engine.completion import Completion
from engine.core import EngineCore
from engine.messages import Abort, Finished, Submit, Tokens
from engine.request import FinishReason, Request
from engine.runner import graphs
from engine.runner.runner import ModelRunner
from engine.speculation import pace
from engine.speculation.planner import FixedPlanner, Planner
from engine.step.plan import StepPlan
from engine.step.shape import ROOT, TreeShape, chain
from kernels.ops import Ops
from server.assembly.drafting import Drafting
from tests.support.drafts.knowing_proposer import KnowingProposer
from tests.support.drafts.scripted_proposer import CyclingPlanner
from tests.support.engines.in_process import ask, generate
from tests.support.engines.tiny_engine import TinyEngine, random_llama
from tests.support.heads.head_lab import SHAPES, HeadLab, write_head
from tests.support.machine import pretend_device
from tests.support.machine.pretend_device import PretendDevice

MAX_LEN = 96


@pytest.fixture(scope="module")
def lab(native_ops: Ops, tmp_path_factory: pytest.TempPathFactory) -> HeadLab:
    engine = TinyEngine(random_llama(), native_ops, max_model_len=MAX_LEN)
    return HeadLab(engine, write_head(engine, tmp_path_factory.mktemp("head") / "eagle3"))


def ahead(lab: HeadLab, **changes: Any) -> HeadLab:
    return replace(lab, engine=replace(lab.engine, padded=True, run_ahead=True, **changes))


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[StepPlan]:
    """The launched plans, in order."""
    seen: list[StepPlan] = []
    launch = ModelRunner.launch

    def noting(self: ModelRunner, plan: StepPlan) -> Any:
        seen.append(plan)
        return launch(self, plan)

    monkeypatch.setattr(ModelRunner, "launch", noting)
    return seen


def requests() -> list[Request]:
    shared = [(7 * i) % 120 + 3 for i in range(40)]
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0, "max_tokens": 29},
        {"temperature": 0.8, "top_k": 12, "top_p": 0.8, "min_p": 0.01},
        {"temperature": 1.2, "max_tokens": 31, "min_tokens": 6},
        {"max_tokens": 3},
        {"max_tokens": 1},
        {"max_tokens": 2, "temperature": 1.0},
        {"temperature": 0.9, "presence_penalty": 0.5, "max_tokens": 6},
        {"logprobs": 2, "max_tokens": 5},
    ]
    return [
        ask(f"{at}", shared[: 3 + 4 * at], **({"max_tokens": 26, "seed": at} | kind))
        for at, kind in enumerate(kinds)
    ] + [ask("long", shared * 2, max_tokens=90, seed=99, temperature=1.0)]  # to the last position


@pytest.fixture(scope="module")
def plain(lab: HeadLab) -> dict[str, Completion]:
    return generate(lab.engine.build(), requests())


def same(heard: dict[str, Completion], expected: dict[str, Completion]) -> None:
    for name, record in heard.items():
        finished, wanted = record.finished, expected[name].finished
        assert finished is not None
        assert wanted is not None
        assert record.token_ids == expected[name].token_ids, name
        assert finished.reason is wanted.reason
        assert finished.num_output == len(record.token_ids)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("per_step", [None, 1], ids=["together", "arriving"])
def test_texts_are_those_of_ordinary_steps(
    lab: HeadLab,
    plain: dict[str, Completion],
    shape: TreeShape,
    per_step: int | None,
    plans: list[StepPlan],
) -> None:
    core, proposer = ahead(lab).build(FixedPlanner(shape))
    same(generate(core, requests(), per_step=per_step), plain)
    assert not proposer.failed
    assert sum(plan.ahead for plan in plans) > 10
    if per_step is None:
        usual, _ = lab.build(FixedPlanner(shape))
        generate(usual, requests())
        assert core.stats().num_drafts >= 0.9 * usual.stats().num_drafts


@pytest.mark.parametrize(
    "changes",
    [
        {"max_num_batched_tokens": 17, "max_num_seqs": 3},
        {"num_blocks": 9},
        {"num_blocks": 9, "prefix_caching": False, "max_num_seqs": 4},
        {"max_num_seqs": 2},
    ],
    ids=["chunked", "preempted", "uncached", "queued"],
)
def test_batches_and_memory_do_not_change_texts(
    lab: HeadLab, plain: dict[str, Completion], changes: dict[str, Any], plans: list[StepPlan]
) -> None:
    shapes = (*SHAPES.values(), chain(1), ROOT)
    core, _ = ahead(lab, **changes).build(CyclingPlanner(shapes))
    same(generate(core, requests(), per_step=2), plain)
    assert sum(plan.ahead for plan in plans) > 10
    if "num_blocks" in changes:
        assert core.stats().num_preemptions > 0


SHARED = [(7 * i) % 120 + 3 for i in range(40)]
PROMPTS = [SHARED[: 3 + 5 * at] for at in range(7)]
KNOWN = (chain(3), chain(5), SHAPES["tree"], ROOT)


def known_requests(**params: Any) -> list[Request]:
    kinds = [{}, {"temperature": 1.0}, {"temperature": 0.9, "top_k": 9}]
    return [
        ask(f"{at}", prompt, **({"max_tokens": 45, "seed": at} | kinds[at % 3] | params))
        for at, prompt in enumerate(PROMPTS)
    ]


@pytest.fixture(scope="module")
def truth(lab: HeadLab) -> list[list[int]]:
    """Prompts with their continuations, beyond any end of text."""
    heard = generate(lab.engine.build(), known_requests(ignore_eos=True))
    return [[*prompt, *heard[f"{at}"].token_ids] for at, prompt in enumerate(PROMPTS)]


def knowing(lab: HeadLab, truth: list[list[int]], planner: Planner, **changes: Any) -> EngineCore:
    table = torch.full((len(truth), MAX_LEN + 64), 5)
    for row, text in zip(table, truth, strict=True):
        row[: len(text)] = torch.tensor(text)
    drafting = Drafting(KnowingProposer(table), planner)
    return ahead(lab, drafting=drafting, **changes).engine.build()


@pytest.mark.parametrize("shape", KNOWN[:3], ids=lambda shape: shape.name)
@pytest.mark.parametrize(
    "params", [{}, {"max_tokens": 11}, {"stop_token_ids": (127, 31)}, {"min_tokens": 7}], ids=str
)
def test_ends_in_the_middle_of_accepted_paths_are_those_of_plain_decoding(
    lab: HeadLab, truth: list[list[int]], shape: TreeShape, params: dict[str, Any]
) -> None:
    """And tokens computed after an end are not counted."""
    ends = frozenset({text[-at * 3 - 8] for at, text in enumerate(truth)})
    usual = replace(lab.engine, eos_token_ids=ends).build()
    expected = generate(usual, known_requests(**params))
    core = knowing(lab, truth, FixedPlanner(shape), eos_token_ids=ends)
    heard = generate(core, known_requests(**params))
    same(heard, expected)
    finished = [record.finished for record in heard.values() if record.finished is not None]
    stats = core.stats()
    assert stats.num_accepted_tokens == sum(end.num_accepted for end in finished)
    assert stats.num_draft_tokens == sum(end.num_drafted for end in finished)
    assert stats.num_accepted_tokens > 20
    assert len(truth) + stats.num_accepted_tokens > stats.num_steps, "paths are long here"


@pytest.mark.parametrize("seed", range(12))
def test_random_arrivals_and_aborts_do_not_change_texts(
    lab: HeadLab, truth: list[list[int]], seed: int, plans: list[StepPlan]
) -> None:
    """Two waves, the second with prompts that the first left in the prefix cache: steps that ran
    after the end of a row must not have changed them."""
    rng = random.Random(seed)
    changes = {
        "num_blocks": rng.choice([9, 14, 128]),
        "max_num_seqs": rng.choice([2, 4, 16]),
        "eos_token_ids": frozenset(rng.sample(range(131), 3)),
        "max_num_batched_tokens": rng.choice([20, 64]),
    }
    waiting = known_requests(ignore_eos=rng.random() < 0.5)
    usual = replace(lab.engine, eos_token_ids=changes["eos_token_ids"])
    expected = generate(usual.build(), waiting)
    again = [
        with_prompt(request, truth[at][: len(request.prompt_ids) + 20])
        for at, request in enumerate(waiting)
    ]
    expected |= generate(usual.build(), again)
    core = knowing(lab, truth, CyclingPlanner(KNOWN), **changes)
    heard: dict[str, Completion] = {}
    for wave in (waiting, again):
        rng.shuffle(wave)
        play(core, wave, heard, rng)
    for name, record in heard.items():
        assert record.finished is not None
        text = expected[name].token_ids
        if record.finished.reason is FinishReason.ABORT:
            text = text[: len(record.token_ids)]
        assert record.token_ids == text, name
    assert any(plan.ahead for plan in plans)
    assert core.stats().kv_usage == 0


def with_prompt(request: Request, prompt: list[int]) -> Request:
    return msgspec.structs.replace(
        request, request_id=f"{request.request_id} again", prompt_ids=prompt
    )


def play(
    core: EngineCore, waiting: list[Request], heard: dict[str, Completion], rng: random.Random
) -> None:
    """Submit at random times; abort some, as a front end does at a stop string."""
    left = list(waiting)
    stops = {request.request_id: rng.randrange(1, 60) for request in waiting}
    while left or core.has_work():
        while left and rng.random() < 0.4:
            request = left.pop()
            heard[request.request_id] = Completion()
            core.add(Submit(request))
        for event in core.step():
            if isinstance(event, Tokens | Finished):
                heard[event.request_id].take(event)
        core.audit()
        for name, at in stops.items():
            if name in heard and heard[name].finished is None and len(heard[name].token_ids) >= at:
                core.add(Abort(name))


@pytest.mark.parametrize(("max_num_seqs", "waits"), [(2, 1), (1, None)], ids=["place", "full"])
def test_the_pipeline_stops_for_a_request_that_could_start_and_for_no_other(
    lab: HeadLab,
    truth: list[list[int]],
    max_num_seqs: int,
    waits: int | None,
    plans: list[StepPlan],
) -> None:
    core = knowing(lab, truth, FixedPlanner(ROOT), max_num_seqs=max_num_seqs)
    first, second = known_requests()[:2]
    core.add(Submit(first))
    for _ in range(4):
        core.step()
    plans.clear()
    core.add(Submit(second))
    for _ in range(4):
        core.step()
    kinds = [(plan.ahead, len(plan.admitted)) for plan in plans]
    assert kinds[0] == ((False, 1) if waits else (True, 0))


def test_an_id_may_come_back_while_its_round_is_in_flight(
    lab: HeadLab, truth: list[list[int]]
) -> None:
    core = knowing(lab, truth, FixedPlanner(chain(3)), max_num_seqs=1)
    first, second = known_requests()[:2]
    core.add(Submit(first))
    for _ in range(4):
        core.step()
    core.add(Abort(first.request_id))
    core.add(Submit(msgspec.structs.replace(second, request_id=first.request_id)))
    record, num_ends = Completion(), 0
    while core.has_work():
        for event in core.step():
            num_ends += isinstance(event, Finished)
            if num_ends == 1 and isinstance(event, Tokens):
                record.take(event)
        core.audit()
    assert record.token_ids == truth[1][len(PROMPTS[1]) :]
    assert num_ends == 2


def test_landing_takes_in_what_is_in_flight(lab: HeadLab, truth: list[list[int]]) -> None:
    """For example before a draft head is swapped. None of its events is lost."""
    core = knowing(lab, truth, FixedPlanner(chain(3)))
    record = Completion()
    core.add(Submit(known_requests()[0]))
    while core.has_work():
        core.land()
        core.audit()
        for event in core.step():
            if isinstance(event, Tokens | Finished):
                record.take(event)
    assert record.token_ids == truth[0][len(PROMPTS[0]) :]


def test_what_is_left_in_flight_is_work(lab: HeadLab, truth: list[list[int]]) -> None:
    core = knowing(lab, truth, FixedPlanner(chain(3)))
    core.add(Submit(known_requests()[0]))
    for _ in range(3):
        core.step()
    ends = [event for event in core.abort_all("stopped") if isinstance(event, Finished)]
    assert [end.reason for end in ends] == [FinishReason.ERROR]
    while core.has_work():
        assert not [e for e in core.step() if isinstance(e, Tokens | Finished)]
    assert core._flight is None


def test_collected_events_are_returned_although_all_is_aborted(
    lab: HeadLab, truth: list[list[int]]
) -> None:
    core = knowing(lab, truth, FixedPlanner(chain(3)))
    record = Completion()
    core.add(Submit(known_requests()[0]))
    events = core.step() + core.step()
    core.land()
    for event in events + core.abort_all("stopped"):
        if isinstance(event, Tokens | Finished):
            record.take(event)
    assert record.finished is not None
    assert record.finished.num_output == len(record.token_ids) > 1


def test_steps_ahead_and_looked_up_drafts_take_turns(
    lab: HeadLab, plans: list[StepPlan], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ways are tried, and neither changes the text. Every step takes as long as any other."""
    now = itertools.count()
    clock = SimpleNamespace(perf_counter=lambda: next(now) / 1000)
    monkeypatch.setattr("engine.runner.laps.time", clock)
    monkeypatch.setattr(pace, "PROBE_EVERY", 6)
    monkeypatch.setattr(pace, "PROBE_STEPS", 3)
    asked = [
        ask(f"{at}", [5, 6, 7, 8, 9] * 3 + [at], max_tokens=60, seed=at, ignore_eos=True)
        for at in range(3)
    ]
    expected = generate(lab.engine.build(), asked)
    plans.clear()
    core, _ = ahead(lab, lookup=True).build(FixedPlanner(chain(3)))
    core._clock = clock.perf_counter
    same(generate(core, asked), expected)
    assert sum(plan.ahead for plan in plans) > 5
    assert sum(any(row.draft for row in plan.rows) for plan in plans) > 2


class LateFetch(transfer.Fetch):
    """Nothing arrives before `wait` is called."""

    order: list[str]

    def __init__(self, there: torch.Tensor) -> None:
        super().__init__(there)
        self._arriving = self._here.clone()
        self._here.fill_(77)
        self.order.append("launch")

    def wait(self) -> torch.Tensor:
        self.order.append("wait")
        self._here.copy_(self._arriving)
        return super().wait()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_a_round_is_launched_before_the_wait_for_the_one_before(
    lab: HeadLab, shape: TreeShape, monkeypatch: pytest.MonkeyPatch, plans: list[StepPlan]
) -> None:
    """There is still one copy each way and no other wait."""
    asked = [ask(f"{at}", [3, 4, 5 + at], max_tokens=30, seed=1, temperature=1.0) for at in (0, 1)]
    expected = generate(lab.engine.build(), asked)
    plans.clear()
    order: list[str] = []
    monkeypatch.setattr(LateFetch, "order", order, raising=False)
    monkeypatch.setattr(graphs, "Fetch", LateFetch)
    ops = pretend_device.operations_of(lab.engine.ops)
    far = replace(lab, engine=replace(lab.engine, ops=ops, device=pretend_device.DEVICE))
    with torch.inference_mode(), PretendDevice() as device:
        core, _ = ahead(far).build(FixedPlanner(shape))
        for request in asked:
            core.add(Submit(request))
        heard = {request.request_id: Completion() for request in asked}
        counts = []
        while core.has_work():
            before = (device.uploads, device.downloads, len(device.waits))
            first = len(order)
            events = core.step()
            after = (device.uploads, device.downloads, len(device.waits))
            counts.append(tuple(b - a for a, b in zip(before, after, strict=True)))
            assert order[first:] in (["launch", "wait"], ["launch"] * 2 + ["wait"], ["wait"], [])
            for event in events:
                if isinstance(event, Tokens | Finished):
                    heard[event.request_id].take(event)
    assert order[:3] == ["launch", "launch", "wait"]
    assert set(counts[3:10]) == {(1, 1, 0)}
    assert all(plan.ahead for plan in plans[3:8])
    same(heard, expected)
