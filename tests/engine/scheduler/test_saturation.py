"""More requests than lines or blocks: what waiting costs, who starts next, and who gives way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

from engine.kv import manager
from engine.kv.block_pool import BlockPool
from engine.request import FinishReason, Request
from engine.scheduler.waiting import WaitingQueue
from engine.speculation.planner import Choice
from engine.step.plan import RowPlan, StepPlan
from engine.step.shape import chain
from tests.support.engines.fake_executor import FakeEngine, choices_of, prompt_of, request, shape

Counted = Counter[str]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    """Calls of what a scheduler does with waiting sequences and their prompts."""
    counts: Counted = Counter()

    def counting(owner: object, name: str) -> None:
        real: Callable[..., object] = getattr(owner, name)

        def call(*args: object, **options: object) -> object:
            counts[name] += 1
            return real(*args, **options)

        monkeypatch.setattr(owner, name, call)

    counting(manager, "chained_hash")
    counting(BlockPool, "contains")
    counting(BlockPool, "count_leading")
    counting(WaitingQueue, "peek")
    return counts


def waiting_for_blocks(num_waiting: int) -> FakeEngine:
    """A row that holds most blocks, and others whose prompts are cached but do not fit."""
    engine = FakeEngine(num_blocks=16, max_num_batched_tokens=16, shapes=(chain(9),))
    engine.executor.always_reject = True
    engine.submit(request("before", prompt_of(24, 2000), max_tokens=1))
    engine.run()
    engine.submit(request("running", prompt_of(40), max_tokens=20))
    for _ in range(3):
        engine.step()
    for number in range(num_waiting):
        engine.submit(request(f"{number}", prompt_of(24, 2000), max_tokens=4))
    return engine


def test_a_sequence_that_waits_for_blocks_is_looked_up_once(counted: Counted) -> None:
    engine = waiting_for_blocks(100)
    counted.clear()
    engine.step()
    assert 1 <= counted["count_leading"] <= 2, "the first, again once draft slots were taken back"
    counted.clear()
    for _ in range(3):
        engine.step()
        assert engine.scheduler.stats().num_waiting == 100
    assert counted["count_leading"] == 0
    assert counted["contains"] <= 3 * 2, "a block each for `_may_start` and `_admit`"
    assert counted["chained_hash"] <= 3, "blocks that the running row filled"
    assert counted["peek"] <= 3 * 2
    engine.run()


def test_steps_run_ahead_and_draft_in_full_while_the_waiting_lack_blocks() -> None:
    engine = waiting_for_blocks(2)
    assert [row.num_draft for row in engine.step().rows] == [7], "half, as one might start"
    plan = engine.scheduler.schedule(Choice(chain(9)))
    assert [row.num_draft for row in plan.rows] == [9]
    assert engine.scheduler.schedule_ahead(plan, lambda _: Choice(chain(1))) is not None


def test_the_first_in_the_queue_starts_as_soon_as_enough_blocks_are_free() -> None:
    engine = waiting_for_blocks(3)
    engine.step()
    engine.scheduler.abort("running")
    assert [name for name, *_ in shape(engine.step(), engine.names)] == ["0", "1"]
    engine.run()


def test_a_sequence_that_lacks_blocks_starts_once_others_publish_its_prefix() -> None:
    engine = FakeEngine(num_blocks=14, max_num_batched_tokens=16)
    first = request("a", prompt_of(34), max_tokens=3)
    engine.submit(request("old", prompt_of(12, 2000), max_tokens=14))
    engine.step()
    engine.submit_choices(*choices_of(first, 2))
    engine.run()
    ends = [engine.heard[name].finished for name in ("a0", "a1")]
    assert [end.num_preemptions for end in ends if end] == [0, 0]


def test_the_prompt_of_all_choices_is_hashed_once(counted: Counted) -> None:
    engine = FakeEngine(max_num_seqs=8)
    engine.submit_choices(*choices_of(request("a", prompt_of(40), max_tokens=2), 8))
    engine.run()
    assert counted["chained_hash"] == 10
    one = next(iter(engine.submitted.values()))
    assert all(other.prompt_ids is one.prompt_ids for other in engine.submitted.values())


def test_a_long_cached_prompt_is_hashed_in_several_steps_while_others_run(
    counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.scheduler.scheduler.HASHED_BLOCKS", 4)
    engine = FakeEngine()
    for name in ("before", "idle"):
        engine.submit(request(name, prompt_of(50, 2000), max_tokens=1))
        counted.clear()
        assert len(engine.run()) == 1, "an idle engine hashes all at once"
        assert counted["chained_hash"] == 12
    engine.submit(request("running", prompt_of(3), max_tokens=20))
    engine.step()
    engine.submit(request("cached", prompt_of(50, 2000), max_tokens=1))
    hashed = []
    while engine.scheduler.stats().num_waiting:
        counted.clear()
        engine.step()
        hashed.append(counted["chained_hash"])
    assert max(hashed) <= 4 + 1, "and a block that the running row filled"
    assert len(hashed) == 3
    engine.run()
    assert engine.heard["cached"].finished.num_cached == 48  # type: ignore[union-attr]


def test_what_waits_is_not_copied() -> None:
    engine = FakeEngine(max_num_seqs=1)
    choices = choices_of(request("a", prompt_of(9), max_tokens=2), 3)
    engine.submit_choices(*choices)
    engine.step()
    live = engine.scheduler._live
    assert [live[f"a{n}"].token_ids is choices[0].prompt_ids for n in range(3)] == [
        False,
        True,
        True,
    ]
    engine.run()


def test_no_more_sequences_start_in_a_step_than_their_blocks_allow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("engine.scheduler.scheduler.ADMITTED_BLOCKS", 5)
    engine = FakeEngine()
    engine.submit(*(request(f"{n}", prompt_of(8), max_tokens=3) for n in range(7)))
    assert [len(plan.admitted) for plan in engine.run()[:3]] == [3, 3, 1]


def starts(engine: FakeEngine) -> list[str]:
    """The order in which requests start."""
    return [admission.request.request_id for plan in engine.run() for admission in plan.admitted]


def test_many_choices_take_turns_with_later_requests() -> None:
    engine = FakeEngine(max_num_seqs=1)
    engine.submit_choices(*choices_of(request("many ", prompt_of(3), max_tokens=1), 5))
    engine.submit(*(request(name, prompt_of(3), max_tokens=1) for name in "abc"))
    expected = ["many 0", "many 1", "a", "many 2", "b", "many 3", "c", "many 4"]
    assert starts(engine) == expected


def test_an_abort_of_all_choices_leaves_nothing_waiting() -> None:
    engine = FakeEngine(max_num_seqs=1)
    choices = choices_of(request("a", prompt_of(9), max_tokens=9), 8)
    engine.submit_choices(*choices)
    engine.step()
    for choice in choices:
        engine.scheduler.abort(choice.request_id)
    engine.run()
    reasons = {heard.finished.reason for heard in engine.heard.values() if heard.finished}
    assert reasons == {FinishReason.ABORT}
    assert engine.scheduler.stats().num_waiting == 0


def test_clients_share_the_lines_fairly() -> None:
    engine = FakeEngine(max_num_seqs=1)
    engine.submit(
        *(request(f"x{n}", prompt_of(4), client="x", max_tokens=4) for n in range(6)),
        *(request(f"y{n}", prompt_of(4), client="y", max_tokens=4) for n in range(3)),
        *(request(f"z{n}", prompt_of(12, 2000), client="z", max_tokens=16) for n in range(2)),
    )
    order = starts(engine)
    assert order[:3] == ["x0", "y0", "z0"]
    assert sorted(order[3:7]) == ["x1", "x2", "y1", "y2"], "z was served as much as three of these"
    assert order.index("z1") < order.index("x5")


def test_a_new_client_waits_for_one_long_prompt_of_another_client_at_most() -> None:
    engine = FakeEngine(max_num_batched_tokens=8)
    engine.submit(*(request(f"x{n}", prompt_of(44, n * 100), client="x") for n in range(2)))
    order = [admission.request.request_id for admission in engine.step().admitted]
    engine.submit(request("y0", prompt_of(4, 3000), client="y"))
    assert [*order, *starts(engine)] == ["x0", "y0", "x1"]


def test_a_more_important_request_takes_a_line_of_a_less_important_one() -> None:
    engine = FakeEngine(max_num_seqs=2, num_blocks=64)
    engine.submit(*(request(name, prompt_of(4), max_tokens=40) for name in "ab"))
    engine.step()
    engine.submit(request("equal", prompt_of(4), max_tokens=2))
    engine.step()
    assert engine.scheduler.stats().num_preemptions == 0
    engine.submit(request("urgent", prompt_of(4, 3000), priority=-10, max_tokens=2))
    plan = engine.step()
    assert [admission.request.request_id for admission in plan.admitted] == ["urgent"]
    assert engine.scheduler.stats().num_preemptions == 1
    engine.run()
    assert engine.heard["b"].finished.num_preemptions == 1  # type: ignore[union-attr]


@pytest.mark.parametrize(("priority", "runs_ahead"), [(0, True), (-1, False)])
def test_no_step_runs_ahead_of_a_request_that_would_take_a_line(
    priority: int, runs_ahead: bool
) -> None:
    engine = FakeEngine(max_num_seqs=1)
    engine.submit(request("running", prompt_of(4), max_tokens=40))
    engine.step()
    engine.submit(request("waiting", prompt_of(4, 2000), priority=priority, max_tokens=2))
    scheduler = engine.scheduler
    plan = StepPlan(
        rows=(RowPlan(line=0, start=4, token_ids=(1,), first_block=0, new_blocks=(), samples=True),)
    )
    assert (scheduler.schedule_ahead(plan, lambda _: Choice()) is not None) == runs_ahead


def test_a_more_important_request_takes_blocks_of_less_important_ones() -> None:
    engine = FakeEngine(num_blocks=16)
    engine.submit(*(request(n, prompt_of(20, ord(n) * 100), max_tokens=9) for n in "abc"))
    engine.step()
    engine.submit(request("urgent", prompt_of(30, 3000), priority=-1, max_tokens=2))
    assert [a.request.request_id for a in engine.step().admitted] == ["urgent"]
    engine.run()
    assert engine.heard["a"].finished.num_preemptions == 0  # type: ignore[union-attr]


def test_a_more_important_prompt_comes_before_a_running_prompt() -> None:
    engine = FakeEngine(max_num_batched_tokens=8)
    engine.submit(request("long", prompt_of(40), max_tokens=1))
    engine.step()
    engine.submit(request("equal", prompt_of(8, 2000), max_tokens=1))
    engine.submit(request("urgent", prompt_of(12, 3000), priority=-1, max_tokens=1))
    assert shape(engine.step(), engine.names) == [("urgent", 0, 8, False)]
    assert shape(engine.step(), engine.names) == [
        ("urgent", 8, 4, True),
        ("long", 8, 4, False),
    ]
    engine.run()


def preempted(engine: FakeEngine, *requests: Request) -> dict[str, int]:
    engine.submit(*requests)
    engine.run()
    ends = [heard.finished for heard in engine.heard.values() if heard.finished]
    return {end.request_id: end.num_preemptions for end in ends if end.num_preemptions}


def test_the_client_that_holds_most_blocks_gives_way() -> None:
    engine = FakeEngine(num_blocks=16, max_model_len=60)
    many = [request(f"x{n}", prompt_of(12, n * 100), client="x", max_tokens=12) for n in range(3)]
    late = request("late", prompt_of(12, 3000), client="y", max_tokens=12)
    found = preempted(engine, *many, late)
    assert "late" not in found
    assert "x0" not in found, "the most important one always goes on"
    assert found
