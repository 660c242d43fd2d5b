"""Orders arrive unchanged, and a step needs few bytes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import get_args

import msgspec
import pytest

from engine.parallel.orders import (
    DropDraft,
    LoadDraft,
    OpenScratch,
    Order,
    Orders,
    PrepareDraft,
    RunStep,
    Stop,
    UseDraft,
)
from engine.parallel.transport import MAX_FRAME
from engine.request import Request, SamplingParams
from engine.step.executor import Launched
from engine.step.plan import UNKNOWN, Admission, RowPlan, StepPlan
from engine.step.shape import ROOT, DynamicShape, StaticShape, chain
from tests.support.engines.fake_executor import FakeEngine, FakeExecutor
from tests.support.engines.in_process import ask
from tests.support.ranks.inboxes import connected

BLOCK = 4
SHAPES = (ROOT, chain(2), chain(2), DynamicShape("dynamic5", 5, 2, 2), ROOT)


def through_bytes(plan: StepPlan) -> tuple[StepPlan, int]:
    """The plan as a follower gets it, and its size in bytes."""
    frame = msgspec.msgpack.encode(RunStep(plan))
    order = msgspec.msgpack.decode(frame, type=Order)
    assert isinstance(order, RunStep)
    return order.plan, len(frame)


class Relay:
    """Encodes and decodes every plan before it runs."""

    def __init__(self, executor: FakeExecutor) -> None:
        self.plans: list[StepPlan] = []
        self._launch = executor.launch
        executor.launch = self._relay  # type: ignore[method-assign]

    def _relay(self, plan: StepPlan) -> Launched:
        arrived, _ = through_bytes(plan)
        assert arrived == plan
        self.plans.append(arrived)
        return self._launch(arrived)

    @property
    def rows(self) -> list[RowPlan]:
        return [row for plan in self.plans for row in plan.rows]


@pytest.mark.parametrize(
    ("num_blocks", "prefix_caching"), [(40, True), (9, True), (9, False)], ids=str
)
def test_plans_of_a_whole_run_arrive(num_blocks: int, prefix_caching: bool) -> None:
    engine = FakeEngine(
        num_blocks=num_blocks,
        block_size=BLOCK,
        prefix_caching=prefix_caching,
        max_num_seqs=3,
        max_num_batched_tokens=7,
        lookahead=1,
        shapes=SHAPES,
    )
    relay = Relay(engine.executor)
    for number in count():
        if number < 12:
            engine.submit(ask(f"r{number}", [3 + i for i in range(4 + number)], max_tokens=12))
        if number == 6:
            engine.scheduler.abort("r4")
        if not engine.scheduler.has_work():
            break
        engine.step()
    engine.step()
    engine.check_idle()
    assert (engine.scheduler.stats().num_preemptions > 0) == (num_blocks == 9)
    assert {row.line for row in relay.rows} == {0, 1, 2}
    assert {plan.shape.name for plan in relay.plans} == {"root", "chain2", "dynamic5"}
    assert any(row.next_token != UNKNOWN for row in relay.rows)


def test_of_a_table_only_new_blocks_are_sent() -> None:
    engine = FakeEngine(block_size=BLOCK)
    relay = Relay(engine.executor)
    engine.submit(ask("long", list(range(3, 33)), max_tokens=20))
    engine.run()
    sent = [len(row.new_blocks) for row in relay.rows]
    assert sent[0] >= 8
    assert max(sent[1:]) <= 2


def row_of(**changes: object) -> RowPlan:
    plain = RowPlan(
        line=2, start=7, token_ids=(9,), first_block=1, new_blocks=(8, 33), samples=True
    )
    return msgspec.structs.replace(plain, **changes)


EVERYTHING = Request(
    request_id="ü",
    prompt_ids=[3, 2**31 - 1],
    params=SamplingParams(
        max_tokens=7,
        min_tokens=2,
        temperature=0.3,
        top_k=4,
        top_p=0.1,
        min_p=1e-7,
        repetition_penalty=1.1,
        presence_penalty=-2.0,
        frequency_penalty=0.1,
        seed=2**64 - 1,
        stop_token_ids=(7, 8),
        ignore_eos=True,
        logit_bias={7: -100.0, 130_000: 0.1},
        logprobs=5,
        prompt_logprobs=0,
    ),
    priority=-3,
    arrival_time=1.7e9,
    max_draft_nodes=0,
)
PLANS = {
    "nothing": StepPlan(),
    "released": StepPlan(released=(0, 5)),
    "admitted": StepPlan(
        rows=(row_of(),), admitted=(Admission(2, EVERYTHING), Admission(1, EVERYTHING, (4, 0)))
    ),
    "chunk": StepPlan(rows=(row_of(token_ids=(1, 2, 3), samples=False, next_token=4),)),
    "blocks again": StepPlan(rows=(row_of(first_block=0),)),  # after some were given back
    "known draft": StepPlan(rows=(row_of(num_draft=2, draft=(5, 6)),)),
    "tree": StepPlan(rows=(row_of(num_draft=2),), shape=StaticShape("t", (-1, 0, 0))),
    "dynamic tree": StepPlan(rows=(row_of(num_draft=4),), shape=DynamicShape("d", 5, 2, 2)),
    "ahead": StepPlan(rows=(row_of(token_ids=(UNKNOWN,)),), ahead=True),
}


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_is_its_own_wire_form(name: str) -> None:
    arrived, _ = through_bytes(PLANS[name])
    assert arrived == PLANS[name]


def test_orders_arrive_in_the_order_in_which_they_were_given() -> None:
    broadcast, followers = connected(2)
    orders = Orders(broadcast)
    orders.load_draft("/heads/ü")
    orders.open_scratch()
    orders.run_step(PLANS["admitted"], scratch=True)
    orders.prepare_draft(loaded=True)
    orders.use_draft(loaded=True)
    orders.run_step(PLANS["ahead"], scratch=False)
    orders.use_draft(loaded=False)
    orders.drop_draft()
    orders.stop()
    wanted: Sequence[Order] = [
        LoadDraft("/heads/ü"),
        OpenScratch(),
        RunStep(PLANS["admitted"], scratch=True),
        PrepareDraft(loaded=True),
        UseDraft(loaded=True),
        RunStep(PLANS["ahead"]),
        UseDraft(loaded=False),
        DropDraft(),
        Stop(),
    ]
    assert {type(order) for order in wanted} == set(get_args(Order))
    for follower, _ in followers:
        frames = [follower.receive() or b"" for _ in wanted]
        assert [msgspec.msgpack.decode(frame, type=Order) for frame in frames] == wanted
        follower.close()
    broadcast.close()


def decoding(num_rows: int) -> StepPlan:
    """Rows far into a large cache, each with a chain of three drafts; every 16th has a new
    block."""
    rows = tuple(
        row_of(
            line=line,
            start=100_000 + line,
            token_ids=(128_000 + line,),
            first_block=6_251,
            new_blocks=(200_000,) if line % 16 == 0 else (),
            num_draft=3,
        )
        for line in range(num_rows)
    )
    return StepPlan(rows=rows, shape=chain(3))


def test_a_decode_step_takes_few_bytes_for_a_row_and_fits_on_the_board() -> None:
    per_row = through_bytes(decoding(64))[1] / 64
    assert per_row <= 25
    assert through_bytes(decoding(1024))[1] <= MAX_FRAME
