"""Rows with draft trees: which rows get nodes, which slots, and what happens to rejected nodes.

`FakeExecutor` asserts that nodes have their own slots within every limit, that a draft head
finds its entries, and that no slot of a rejected node is ever read as text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import msgspec
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from engine.kv.manager import KVManager
from engine.request import Sequence
from engine.scheduler.drafts import DraftRoom
from engine.scheduler.limits import SchedulerLimits
from engine.scheduler.plan_builder import PlanBuilder
from engine.scheduler.scheduler import Scheduler
from engine.speculation.lookup import Lookup
from engine.speculation.planner import Choice
from engine.step.plan import RowOutcome, StepOutcome, StepPlan
from engine.step.shape import ROOT, DynamicShape, StaticShape, TreeShape, chain
from tests.engine.scheduler.test_traces import TRACES, Abort, Arrival, Step, engines, play
from tests.support.engines.fake_executor import (
    EOS,
    PROMPT_VOCAB,
    FakeEngine,
    prompt_of,
    request,
    shape,
)

BUSH = StaticShape("bush", (-1, 0, 0, 0, 1, 1, 2))
SHAPES: tuple[TreeShape, ...] = (
    chain(1),
    chain(3),
    ROOT,
    BUSH,
    chain(7),
    DynamicShape("dynamic", 5, 3, 2),
)
LIMITS = (None, None, 0, 1, 3)


def num_draft(plan: StepPlan, names: Mapping[int, str]) -> dict[str, int]:
    return {names[row.line]: row.num_draft for row in plan.rows}


@st.composite
def drafting_engines(draw: st.DrawFn) -> FakeEngine:
    plain = draw(engines())
    shapes = tuple(draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=4)))
    return replace(
        plain,
        lookahead=draw(st.sampled_from([1, 1, 0])),
        shapes=shapes,
        lookup=draw(st.booleans()),
    )


def limited(trace: list[Arrival | Abort | Step], engine: FakeEngine) -> None:
    """Play a trace in which requests have different tree limits in turn."""
    submit = engine.scheduler.submit

    def submit_limited(asked: object) -> None:
        at = len(engine.submitted)
        submit(msgspec.structs.replace(asked, max_draft_nodes=LIMITS[at % len(LIMITS)]))

    engine.scheduler.submit = submit_limited  # type: ignore[method-assign]
    play(engine, trace)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(drafting_engines(), TRACES)
def test_every_trace_with_trees_keeps_the_rules_and_gives_every_request_its_own_text(
    engine: FakeEngine, trace: list[Arrival | Abort | Step]
) -> None:
    limited(trace, engine)
    engine.run()
    stats, totals = engine.scheduler.stats(), engine.executor.totals
    ends = [record.finished for record in engine.heard.values() if record.finished]
    assert stats.num_drafts == totals.num_drafts == sum(end.num_drafts for end in ends)
    assert stats.num_draft_tokens == totals.num_draft_tokens
    assert stats.num_draft_tokens == sum(end.num_drafted for end in ends)
    assert stats.num_accepted_tokens == sum(end.num_accepted for end in ends)
    assert stats.num_accepted_tokens == sum(stats.accepted_per_position)
    assert list(stats.accepted_per_position) == sorted(stats.accepted_per_position, reverse=True)
    assert sum(stats.steps_by_tree.values()) == stats.num_steps
    event(f"preempted: {stats.num_preemptions > 0}, accepted: {stats.num_accepted_tokens > 0}")


@settings(max_examples=150, deadline=None, derandomize=True)
@given(engines(), TRACES, st.sampled_from(SHAPES))
def test_nodes_preempt_no_sequence(
    plain: FakeEngine, trace: list[Arrival | Abort | Step], tree: TreeShape
) -> None:
    """While there is a block for every root, all roots make progress. (Priorities are equal: no
    sequence is preempted for a more important one.)"""
    engine = replace(plain, shapes=(tree,))
    for act in trace:
        play(engine, [replace(act, priority=0) if isinstance(act, Arrival) else act])
        decoding = engine.executor.decoding()
        if engine.scheduler.stats().num_running and len(decoding) == len(engine.executor.rows):
            before = engine.scheduler.stats().num_preemptions
            free = round((1 - engine.scheduler.stats().kv_usage) * engine.num_blocks)
            engine.step()
            if free >= len(decoding):  # a block for every root
                assert engine.scheduler.stats().num_preemptions == before
    engine.run()


def test_a_chain_of_slots_follows_the_root() -> None:
    engine = FakeEngine(shapes=(chain(5),))
    engine.submit(request("a", prompt_of(6), max_tokens=20))
    assert num_draft(engine.step(), engine.names) == {"a": 0}
    plan = engine.step()
    assert shape(plan, engine.names) == [("a", 6, 1, True)]
    assert num_draft(plan, engine.names) == {"a": 5}
    assert plan.num_tokens == 6
    assert plan.rows[0].num_blocks == 3
    engine.run()


@pytest.mark.parametrize(
    ("limit", "expected"), [(None, 6), (0, 0), (1, 1), (3, 3), (6, 6), (100, 6)]
)
def test_a_request_may_limit_its_own_tree(limit: int | None, expected: int) -> None:
    engine = FakeEngine(shapes=(BUSH,))
    asked = request("a", prompt_of(6), max_tokens=20)
    engine.submit(msgspec.structs.replace(asked, max_draft_nodes=limit))
    engine.step()
    assert num_draft(engine.step(), engine.names) == {"a": expected}


@pytest.mark.parametrize(
    ("wanted", "max_tokens", "expected"), [(3, 20, 3), (99, 20, 20), (3, 2, 0)]
)
def test_the_planner_is_told_what_a_request_wants_at_least(
    wanted: int, max_tokens: int, expected: int
) -> None:
    engine = FakeEngine(max_model_len=28)
    asked = request("a", prompt_of(6), max_tokens=max_tokens)
    engine.submit(msgspec.structs.replace(asked, min_draft_nodes=wanted))
    engine.step()
    assert [row.least for row in engine.scheduler.candidates()] == [expected]


def num_candidates(engine: FakeEngine) -> int:
    return sum(row.most > 0 for row in engine.scheduler.candidates())


@pytest.mark.parametrize(
    ("limits", "max_tokens", "expected"),
    [((None, 3), 20, 2), ((None, 0), 20, 1), ((0, 0), 20, 0), ((None, 0), 2, 0)],
)
def test_only_rows_that_could_carry_a_tree_count_for_the_planner(
    limits: tuple[int | None, ...], max_tokens: int, expected: int
) -> None:
    engine = FakeEngine(shapes=(chain(5),))
    for at, limit in enumerate(limits):
        asked = request(f"{at}", prompt_of(6, at * 100 + 1000), max_tokens=max_tokens)
        engine.submit(msgspec.structs.replace(asked, max_draft_nodes=limit))
    engine.step()
    assert num_candidates(engine) == expected
    assert sum(count > 0 for count in num_draft(engine.step(), engine.names).values()) == expected


def test_rows_at_the_end_of_the_context_do_not_count_for_the_planner() -> None:
    engine = FakeEngine(shapes=(chain(5),))
    engine.submit(request("a", prompt_of(62), max_tokens=20))
    engine.submit(request("b", prompt_of(2, 2000), max_tokens=20))
    engine.step()
    assert num_candidates(engine) == 1
    engine.run()


@pytest.mark.parametrize(("max_tokens", "expected"), [(1, None), (2, 0), (3, 5), (4, 5)])
def test_no_draft_when_one_token_is_missing(max_tokens: int, expected: int | None) -> None:
    engine = FakeEngine(shapes=(chain(5),))
    engine.submit(request("a", prompt_of(6), max_tokens=max_tokens))
    engine.step()
    assert num_draft(engine.step(), engine.names).get("a") == expected


@pytest.mark.parametrize(
    ("length", "expected"), [(20, 5), (56, 5), (57, 5), (58, 4), (61, 1), (62, 0)]
)
def test_nodes_and_the_bonus_token_stay_within_the_context(length: int, expected: int) -> None:
    engine = FakeEngine(shapes=(chain(5),), lookahead=1)
    engine.submit(request("a", prompt_of(length), max_tokens=100))
    engine.step()
    assert num_draft(engine.step(), engine.names) == {"a": expected}
    engine.run()


def test_every_root_comes_before_the_first_node() -> None:
    engine = FakeEngine(max_num_batched_tokens=8, max_num_seqs=4, shapes=(chain(5),))
    for name in "abcd":
        engine.submit(request(name, prompt_of(2, ord(name) * 100), max_tokens=30))
    engine.step()
    assert num_draft(engine.step(), engine.names) == {"a": 4, "b": 0, "c": 0, "d": 0}
    engine.run()


def test_trees_leave_half_of_the_budget_to_prompts() -> None:
    engine = FakeEngine(max_num_batched_tokens=16, shapes=(chain(15),))
    engine.submit(request("old", prompt_of(3), max_tokens=40))
    engine.step()
    assert num_draft(engine.step(), engine.names) == {"old": 15}
    engine.submit(request("new", prompt_of(20, first=2000), max_tokens=2))
    plan = engine.step()
    assert num_draft(plan, engine.names) == {"old": 7, "new": 0}
    assert shape(plan, engine.names)[1] == ("new", 0, 8, False)
    engine.run()


def test_trees_may_take_all_while_no_row_is_free_for_the_waiting() -> None:
    engine = FakeEngine(max_num_batched_tokens=16, max_num_seqs=1, shapes=(chain(15),))
    engine.submit(request("old", prompt_of(3), max_tokens=40))
    engine.step()
    engine.submit(request("new", prompt_of(20, first=2000), max_tokens=2))
    assert num_draft(engine.step(), engine.names) == {"old": 15}


def test_nodes_get_no_block_that_another_root_needs() -> None:
    engine = FakeEngine(num_blocks=4, shapes=(chain(3),))
    engine.submit(request("a", prompt_of(4), max_tokens=3))
    engine.submit(request("b", prompt_of(4, 2000), max_tokens=3))
    engine.step()
    plan = engine.step()
    assert shape(plan, engine.names) == [("a", 4, 1, True), ("b", 4, 1, True)]
    assert [row.num_blocks for row in plan.rows] == [2, 2]
    engine.run()
    assert engine.scheduler.stats().num_preemptions == 0


def test_blocks_of_rejected_nodes_go_to_rows_that_need_them() -> None:
    engine = FakeEngine(num_blocks=7, max_model_len=28, shapes=(chain(15),))
    engine.executor.always_reject = True
    engine.submit(request("a", prompt_of(4), max_tokens=8))
    engine.step()
    assert engine.step().rows[0].num_blocks == 5
    engine.submit(request("b", prompt_of(11, 2000), max_tokens=3))
    plan = engine.step()
    assert shape(plan, engine.names) == [("a", 5, 1, True), ("b", 0, 11, True)]
    engine.run()
    assert engine.scheduler.stats().num_preemptions == 0


def test_what_follows_the_end_of_a_text_is_not_cached() -> None:
    kv = KVManager(32, 4, prefix_caching=True)
    scheduler = Scheduler(SchedulerLimits(4, 64, 64), kv, frozenset({EOS}), vocab_size=PROMPT_VOCAB)
    scheduler.submit(request("a", prompt_of(7), max_tokens=30, ignore_eos=False))
    scheduler.update(scheduler.schedule(), StepOutcome((RowOutcome((5,)),)))
    plan = scheduler.schedule(Choice(chain(7)))
    events = scheduler.update(plan, StepOutcome((RowOutcome((6, EOS, 8, 9, 10, 11, 12, 13), 7),)))
    assert [event.token_ids for event in events[:1]] == [[6, EOS]]  # type: ignore[union-attr]
    scheduler.submit(request("b", [*prompt_of(7), 5, 6, EOS, 8, 9, 10, 11, 12], max_tokens=1))
    assert scheduler.schedule().rows[0].start == 8  # 7 + 1 accepted token whose KV is cached
    scheduler.audit()
    stats = scheduler.stats()
    assert (stats.num_drafts, stats.num_draft_tokens, stats.num_accepted_tokens) == (1, 7, 2)
    assert stats.accepted_per_position == (1, 1)


def test_accepted_tokens_are_cached_for_the_next_turn() -> None:
    engine = FakeEngine(shapes=(chain(7),), lookahead=1)
    engine.submit(request("turn 1", prompt_of(6), max_tokens=17))
    engine.run()
    history = prompt_of(6) + engine.heard["turn 1"].token_ids
    engine.submit(request("turn 2", [*history, 1, 2, 3], max_tokens=1))
    assert engine.run_shapes()[0] == [("turn 2", 19, 7, True)]


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 9, 13, 30])
def test_a_draft_head_costs_one_token_of_a_prefix_hit(length: int) -> None:
    cached = []
    for lookahead in (0, 1):
        engine = FakeEngine(lookahead=lookahead, shapes=(chain(3),))
        for name in ("first", "second"):
            engine.submit(request(name, prompt_of(length), max_tokens=6))
            engine.run()
        end = engine.heard["second"].finished
        assert end is not None
        cached.append(end.num_cached)
        assert engine.scheduler.stats().prefix_hits == end.num_cached
    assert cached[1] == max(0, cached[0] - 1)


@pytest.mark.parametrize("length", [63, 64])
def test_a_prompt_that_fills_everything_is_scored(length: int) -> None:
    engine = FakeEngine(num_blocks=16, lookahead=1, shapes=(chain(3),))
    engine.submit(request("a", prompt_of(length), max_tokens=0, prompt_logprobs=0))
    assert len(engine.run()) == 1
    assert len(engine.heard["a"].prompt_logprobs) == length


def test_each_row_has_its_own_limit_and_rows_without_one_do_not_draft() -> None:
    engine = FakeEngine()
    for name in "abc":
        engine.submit(request(name, prompt_of(2, ord(name) * 100), max_tokens=30))
    engine.step()
    lines = {name: line for line, name in engine.names.items()}
    limits = {lines["a"]: 2, lines["b"]: 9}
    plan = engine.scheduler.schedule(Choice(chain(5), limits))
    assert num_draft(plan, engine.names) == {"a": 2, "b": 5, "c": 0}


def looked_up(choice: Choice, num_rows: int) -> list[int]:
    """Looked-up nodes of rows whose texts repeat."""
    plan, rows = PlanBuilder(100, num_rows), []
    for line in range(num_rows):
        seq = Sequence.from_request(request(f"{line}", [5, 6, 7, 8, 9, 5, 6, 7], max_tokens=9))
        seq.own_tokens()
        seq.line, seq.num_computed = line, 7
        rows.append(seq)
        plan.add(seq, 1)
    kv = KVManager(num_blocks=64, block_size=4, prefix_caching=False)
    DraftRoom(kv, max_len=64, lookahead=0, lookup=Lookup()).share_budget(plan, rows, choice)
    return [len(row.found) for row in plan.rows.values()]


def test_looked_up_drafts_must_pay_together_for_a_step_that_is_not_plain() -> None:
    dear = Choice(price=0.1, entry=3.0, may_try=False)
    alone, together = looked_up(dear, 1), looked_up(dear, 8)
    assert alone == [0]
    assert min(together) > 0
    assert min(looked_up(Choice(price=0.1), 1)) > 0
    assert looked_up(Choice(price=1.0), 2) == [0, 0]
