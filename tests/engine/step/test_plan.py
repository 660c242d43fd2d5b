"""Plans and outcomes survive msgpack unchanged; plans are small, with only new blocks."""

from __future__ import annotations

import random

import msgspec
import pytest

from engine.messages import TokenLogprob
from engine.step.plan import UNKNOWN, Admission, RowOutcome, RowPlan, StepOutcome, StepPlan
from engine.step.shape import ROOT, DynamicShape, chain
from tests.support.engines.fake_executor import FakeEngine, prompt_of, request
from tests.support.engines.plans import decoding, random_admission, random_plan

VOCAB = 50


def admissions(rng: random.Random) -> list[Admission]:
    return [random_admission(line, rng, VOCAB) for line in range(6)]


@pytest.mark.parametrize("seed", range(20))
def test_plans_survive_the_wire(seed: int) -> None:
    rng = random.Random(seed)
    plan = random_plan(rng, admissions(rng), block_size=4)
    sent = msgspec.msgpack.encode(plan)
    assert msgspec.msgpack.decode(sent, type=StepPlan) == plan
    assert msgspec.msgpack.encode(msgspec.msgpack.decode(sent, type=StepPlan)) == sent


@pytest.mark.parametrize("shape", [ROOT, chain(3), DynamicShape("dynamic", 9, 3, 4)])
def test_the_kind_of_shape_survives_the_wire(shape: object) -> None:
    plan = StepPlan(shape=shape, ahead=True)  # type: ignore[arg-type]
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(plan), type=StepPlan) == plan


def random_scores(rng: random.Random, count: int) -> tuple[TokenLogprob, ...] | None:
    if rng.random() < 0.5:
        return None
    width = rng.randrange(4)
    return tuple(
        TokenLogprob(
            rng.randrange(VOCAB), -rng.random(), [(n, -rng.random()) for n in range(width)]
        )
        for _ in range(count)
    )


@pytest.mark.parametrize("seed", range(20))
def test_outcomes_survive_the_wire(seed: int) -> None:
    rng = random.Random(seed)
    rows = []
    for _ in range(rng.randrange(6)):
        emitted = tuple(rng.choices(range(VOCAB), k=rng.randrange(5)))
        path = tuple(range(1, len(emitted)))
        scores = random_scores(rng, len(emitted)), random_scores(rng, rng.randrange(9))
        rows.append(RowOutcome(emitted, rng.randrange(9), path, *scores))
    outcome = StepOutcome(tuple(rows), {"draft": rng.random()}, rng.randrange(3), seed % 2 == 0)
    sent = msgspec.msgpack.encode(outcome)
    assert msgspec.msgpack.decode(sent, type=StepOutcome) == outcome


def row(num_tokens: int, *, samples: bool, num_draft: int = 0) -> RowPlan:
    return RowPlan(
        line=0,
        start=0,
        token_ids=(5,) * num_tokens,
        first_block=2,
        new_blocks=(7, 9),
        samples=samples,
        num_draft=num_draft,
        next_token=UNKNOWN if samples else 5,
    )


@pytest.mark.parametrize(
    ("rows", "num_tokens", "only_decodes"),
    [
        ((), 0, True),
        ((row(1, samples=True),), 1, True),
        ((row(1, samples=True, num_draft=3), row(1, samples=True)), 5, True),
        ((row(1, samples=True), row(1, samples=False)), 2, False),
        ((row(1, samples=True), row(4, samples=True)), 5, False),
        ((row(4, samples=False),), 4, False),
    ],
)
def test_a_plan_counts_its_tokens_and_knows_whether_it_computes_a_prompt(
    rows: tuple[RowPlan, ...], num_tokens: int, only_decodes: bool
) -> None:
    plan = StepPlan(rows=rows)
    assert (plan.num_tokens, plan.only_decodes) == (num_tokens, only_decodes)


@pytest.mark.parametrize(
    ("num_draft", "draft", "drafted"), [(0, (), False), (2, (), True), (2, (4, 5), False)]
)
def test_the_proposer_drafts_where_nodes_have_room_and_no_tokens(
    num_draft: int, draft: tuple[int, ...], drafted: bool
) -> None:
    row = decoding(0, num_draft, draft)
    assert row.is_drafted is drafted
    assert StepPlan(rows=(decoding(1, 0, ()), row)).is_drafted is drafted


@pytest.mark.parametrize("seed", range(10))
def test_block_changes_add_up_to_the_blocks_of_every_sequence(seed: int) -> None:
    """Replayed only from the plans, with few blocks, changing trees, and preempted, cached and
    aborted sequences."""
    rng = random.Random(seed)
    engine = FakeEngine(
        num_blocks=rng.choice([12, 20, 40]),
        max_num_seqs=4,
        max_num_batched_tokens=24,
        max_model_len=40,
        lookahead=rng.choice([0, 1]),
        shapes=(chain(7), ROOT, chain(3)),
        lookup=rng.random() < 0.5,
    )
    blocks: dict[int, tuple[int, ...]] = {}
    for number in range(25):
        asked = request(
            f"{number}", prompt_of(rng.randint(1, 18)), max_tokens=12, priority=rng.randrange(3)
        )
        engine.submit(asked)
        if rng.random() < 0.2:
            engine.scheduler.abort(f"{rng.randint(0, number)}")
        replay(engine, blocks)
    while engine.scheduler.has_work():
        replay(engine, blocks)
    assert blocks == {}


def replay(engine: FakeEngine, blocks: dict[int, tuple[int, ...]]) -> None:
    """Run one step; the plan must give exactly the blocks that `schedule` has reserved."""
    held: dict[int, tuple[int, ...]] = {}
    schedule = engine.scheduler.schedule

    def noting(*args: object) -> StepPlan:
        plan = schedule(*args)  # type: ignore[arg-type]
        for seq in engine.scheduler._running:
            held[seq.line] = tuple(seq.block_ids)
        return plan

    engine.scheduler.schedule = noting  # type: ignore[method-assign, assignment]
    plan = engine.step()
    engine.scheduler.schedule = schedule  # type: ignore[method-assign]
    for line in plan.released:
        del blocks[line]
    for admission in plan.admitted:
        assert admission.line not in blocks
        blocks[admission.line] = ()
    for part in plan.rows:
        kept = blocks[part.line][: part.first_block]
        assert len(kept) == part.first_block
        blocks[part.line] = kept + part.new_blocks
        assert blocks[part.line] == held[part.line]
        assert part.num_blocks == len(held[part.line])
