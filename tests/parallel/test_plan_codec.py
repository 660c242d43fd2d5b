"""Plans arrive as they were sent, whatever was said before."""

from __future__ import annotations

from dataclasses import replace
from itertools import count

import msgspec
import pytest
from engine.parallel.frames import Order, PlanFrame
from engine.parallel.plan_codec import PlanDecoder, PlanEncoder

from engine.step.plan import StepOutcome, StepPlan
from engine.step.shape import ROOT, DynamicShape, chain
from tests.support.engines import ask
from tests.support.fake_executor import FakeEngine, FakeExecutor

BLOCK = 4
SHAPES = (ROOT, chain(2), chain(2), DynamicShape("dynamic5", 5, 2, 2), ROOT)


class Relay:
    """Sends every plan through bytes; what arrives must be what was sent."""

    def __init__(self, behind: FakeExecutor) -> None:
        self.encoder, self.decoder = PlanEncoder(BLOCK), PlanDecoder()
        self.frames: list[PlanFrame] = []
        self._execute = behind.execute

    def execute(self, plan: StepPlan) -> StepOutcome:
        order = msgspec.msgpack.decode(self.encoder.encode(plan), type=Order)
        assert isinstance(order, PlanFrame)
        self.frames.append(order)
        assert self.decoder.decode(order) == plan
        return self._execute(plan)


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
    engine.executor.execute = relay.execute  # type: ignore[method-assign]
    for number in count():
        if number < 12:
            engine.submit(ask(f"r{number}", [3 + i for i in range(4 + number)], max_tokens=12))
        if number == 6:
            engine.scheduler.abort("r4")
        if not engine.scheduler.has_work():
            break
        engine.step()
    engine.step()
    assert (engine.scheduler.stats().num_preemptions > 0) == (num_blocks == 9)
    assert {row.line for frame in relay.frames for row in frame.rows} == {0, 1, 2}
    assert any(frame.rows and frame.shape is None for frame in relay.frames)
    assert any(row.next_token is not None for frame in relay.frames for row in frame.rows)


def test_of_a_table_only_new_blocks_are_sent() -> None:
    engine = FakeEngine(block_size=BLOCK)
    relay = Relay(engine.executor)
    engine.executor.execute = relay.execute  # type: ignore[method-assign]
    engine.submit(ask("long", list(range(3, 33)), max_tokens=20))
    engine.run()
    sent = [len(row.block_ids) for frame in relay.frames for row in frame.rows]
    assert sent[0] >= 8
    assert max(sent[1:]) <= 2


def test_blocks_behind_the_computed_tokens_are_sent_again() -> None:
    encoder, decoder = PlanEncoder(BLOCK), PlanDecoder()
    plans: list[StepPlan] = []
    engine = FakeEngine(block_size=BLOCK)
    relay = Relay(engine.executor)
    engine.executor.execute = lambda plan: plans.append(plan) or relay.execute(plan)  # type: ignore
    engine.submit(ask("row", list(range(3, 9)), max_tokens=1))
    engine.run()
    first = plans[0]
    (row,) = first.rows
    moved = replace(row, start=4, token_ids=row.token_ids[4:], block_ids=[row.block_ids[0], 33])
    moved = replace(moved, num_draft=2, draft=(5, 6))
    for plan in (first, StepPlan((moved,))):
        order = msgspec.msgpack.decode(encoder.encode(plan), type=Order)
        assert isinstance(order, PlanFrame)
        assert decoder.decode(order) == plan
