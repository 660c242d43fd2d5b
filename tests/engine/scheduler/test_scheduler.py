"""Scripted steps: which rows are planned, and which events clients get."""

from __future__ import annotations

import subprocess
import sys

import pytest

from engine.messages import ErrorCode
from engine.request import FinishReason
from engine.scheduler.limits import SchedulerLimits
from engine.step.executor import execute
from tests.support.engines.fake_executor import FakeEngine, prompt_of, request, shape


def test_planning_imports_no_torch() -> None:
    code = (
        "import sys, engine.core, engine.scheduler.scheduler, engine.kv.manager\n"
        "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_limits_leave_room_for_one_token_of_every_sequence() -> None:
    SchedulerLimits(max_num_seqs=8, max_num_batched_tokens=8, max_model_len=64)
    with pytest.raises(ValueError, match="max_num_batched_tokens is 7, max_num_seqs is 8"):
        SchedulerLimits(max_num_seqs=8, max_num_batched_tokens=7, max_model_len=64)


def test_a_long_prompt_is_computed_in_chunks_of_the_budget() -> None:
    engine = FakeEngine(max_num_batched_tokens=8)
    engine.submit(request("a", prompt_of(20), max_tokens=2))
    assert engine.run_shapes() == [
        [("a", 0, 8, False)],
        [("a", 8, 8, False)],
        [("a", 16, 4, True)],
        [("a", 20, 1, True)],
    ]


def test_decoding_continues_beside_a_long_prompt() -> None:
    engine = FakeEngine(max_num_batched_tokens=8)
    engine.submit(request("old", prompt_of(3), max_tokens=5))
    engine.step()
    engine.submit(request("new", prompt_of(17, first=2000), max_tokens=2))
    assert engine.run_shapes() == [
        [("old", 3, 1, True), ("new", 0, 7, False)],
        [("old", 4, 1, True), ("new", 7, 7, False)],
        [("old", 5, 1, True), ("new", 14, 3, True)],
        [("old", 6, 1, True), ("new", 17, 1, True)],
    ]


def test_decoding_comes_before_a_more_important_prompt() -> None:
    engine = FakeEngine(max_num_batched_tokens=8)
    engine.submit(request("mild", prompt_of(3), priority=5, max_tokens=4))
    engine.step()
    engine.submit(request("urgent", prompt_of(9, first=2000), priority=-1, max_tokens=1))
    assert shape(engine.step(), engine.names) == [("mild", 3, 1, True), ("urgent", 0, 7, False)]
    assert shape(engine.step(), engine.names) == [("mild", 4, 1, True), ("urgent", 7, 2, True)]


def test_a_running_prompt_comes_before_new_admissions() -> None:
    engine = FakeEngine(max_num_batched_tokens=8)
    engine.submit(request("a", prompt_of(12)), request("b", prompt_of(12, first=2000)))
    assert shape(engine.step(), engine.names) == [("a", 0, 8, False)]
    assert shape(engine.step(), engine.names) == [("a", 8, 4, True), ("b", 0, 4, False)]


def test_priority_then_submission_decide_the_order() -> None:
    engine = FakeEngine(max_num_seqs=1)
    engine.submit(
        request("mild", prompt_of(3), priority=1, max_tokens=1),
        request("early", prompt_of(3), max_tokens=1),
        request("late", prompt_of(3), max_tokens=1),
        request("urgent", prompt_of(3), priority=-3, max_tokens=1),
    )
    order = [name for rows in engine.run_shapes() for name, *_ in rows]
    assert order == ["urgent", "early", "late", "mild"]


def test_at_most_max_num_seqs_run_at_once() -> None:
    engine = FakeEngine(max_num_seqs=2)
    engine.submit(*(request(name, prompt_of(3), max_tokens=3) for name in "abcde"))
    sizes = [len(plan.rows) for plan in engine.run()]
    assert max(sizes) == 2
    assert sum(sizes) == 15


@pytest.mark.parametrize(
    ("length", "cached"), [(1, 0), (3, 0), (4, 0), (5, 4), (8, 4), (9, 8), (10, 8), (12, 8)]
)
def test_a_repeated_prompt_is_cached_up_to_its_last_whole_block(length: int, cached: int) -> None:
    engine = FakeEngine()
    for name in ("first", "second"):
        engine.submit(request(name, prompt_of(length), max_tokens=1))
        shapes = engine.run_shapes()
    assert engine.heard["second"].finished is not None
    assert engine.heard["second"].finished.num_cached == cached
    assert shapes[0] == [("second", cached, length - cached, True)]
    stats = engine.scheduler.stats()
    assert (stats.prefix_queries, stats.prefix_hits) == (2 * length, cached)


def test_a_prefix_is_shared_while_its_first_user_still_runs() -> None:
    engine = FakeEngine()
    engine.submit(request("first", prompt_of(9), max_tokens=9))
    engine.step()
    engine.submit(request("second", prompt_of(9), max_tokens=9))
    plan = engine.step()
    first, second = (engine.executor.rows[row.line].block_ids for row in plan.rows)
    assert first[:2] == second[:2]
    assert first[2] != second[2]
    engine.run()


def test_output_is_cached_for_the_next_turn_of_a_conversation() -> None:
    engine = FakeEngine()
    engine.submit(request("turn 1", prompt_of(6), max_tokens=7))
    engine.run()
    history = prompt_of(6) + engine.heard["turn 1"].token_ids
    engine.submit(request("turn 2", [*history, 1, 2, 3], max_tokens=1))
    assert engine.run_shapes()[0] == [("turn 2", 12, 4, True)]


def test_without_prefix_caching_nothing_is_looked_up() -> None:
    engine = FakeEngine(prefix_caching=False)
    for name in ("first", "second"):
        engine.submit(request(name, prompt_of(12), max_tokens=1))
        assert engine.run_shapes()[0] == [(name, 0, 12, True)]
    assert engine.scheduler.stats().prefix_queries == 0


def test_prompt_logprobs_need_every_prompt_token_computed() -> None:
    engine = FakeEngine()
    engine.submit(request("first", prompt_of(12), max_tokens=1))
    engine.run()
    engine.submit(request("second", prompt_of(12), max_tokens=1, prompt_logprobs=0))
    assert engine.run_shapes()[0] == [("second", 0, 12, True)]


def test_an_abort_ends_a_waiting_request() -> None:
    engine = FakeEngine(max_num_seqs=1)
    engine.submit(request("a", prompt_of(3), max_tokens=2), request("b", prompt_of(3)))
    engine.step()
    engine.scheduler.abort("b")
    assert "b" not in engine.step().released  # it never ran
    assert_aborted(engine, "b", num_output=0)


def test_an_abort_ends_a_running_request_and_frees_its_blocks() -> None:
    engine = FakeEngine()
    engine.submit(request("a", prompt_of(9)))
    engine.step()
    engine.step()
    engine.scheduler.abort("a")
    assert engine.scheduler.stats().kv_usage == 0
    plan = engine.step()
    assert plan.rows == ()
    assert [engine.names[line] for line in plan.released] == ["a"]
    assert_aborted(engine, "a", num_output=2)


def test_an_abort_ends_a_request_in_the_middle_of_its_prompt() -> None:
    engine = FakeEngine(max_num_batched_tokens=8)
    engine.submit(request("a", prompt_of(20)))
    engine.step()
    engine.scheduler.abort("a")
    assert_aborted(engine, "a", num_output=0)


def test_an_abort_ends_a_preempted_request() -> None:
    engine = FakeEngine(num_blocks=8)
    engine.submit(request("urgent", prompt_of(8), max_tokens=14))
    engine.submit(request("mild", prompt_of(8, first=2000), priority=1, max_tokens=14))
    while not engine.scheduler.stats().num_preemptions:
        engine.step()
    engine.scheduler.abort("mild")
    assert_aborted(engine, "mild", num_output=len(engine.heard["mild"].token_ids))


def assert_aborted(engine: FakeEngine, name: str, num_output: int) -> None:
    engine.run()
    finished = engine.heard[name].finished
    assert finished is not None
    assert (finished.reason, finished.num_output) == (FinishReason.ABORT, num_output)


def test_an_abort_of_an_unknown_or_finished_id_does_nothing() -> None:
    engine = FakeEngine()
    engine.submit(request("a", prompt_of(3), max_tokens=1))
    engine.run()
    engine.scheduler.abort("a")
    engine.scheduler.abort("never heard of")
    assert not engine.scheduler.has_work()


def test_an_id_in_use_is_refused_and_a_finished_one_may_come_again() -> None:
    engine = FakeEngine()
    engine.submit(request("a", prompt_of(3), max_tokens=2))
    with pytest.raises(ValueError, match="request_id 'a' is in use"):
        engine.scheduler.submit(request("a", prompt_of(4)))
    engine.run()
    engine.submit(request("a", prompt_of(4), max_tokens=2))
    engine.run()


def test_an_id_may_come_again_before_the_executor_knows_of_its_end() -> None:
    engine = FakeEngine()
    engine.submit(request("a", prompt_of(3), max_tokens=1))
    engine.step()
    engine.submit(request("a", prompt_of(5, first=2000), max_tokens=2))
    plan = engine.step()
    assert [engine.names[line] for line in plan.released] == ["a"]
    assert [admission.request.request_id for admission in plan.admitted] == ["a"]
    engine.run()


@pytest.mark.parametrize(
    ("num_prompt", "max_tokens", "problem"),
    [
        (15, 8, None),  # room for one token
        (16, 0, None),  # nothing is generated
        (16, 1, "maximum context length is 16 tokens, but the prompt has 16"),
        (17, 0, "maximum context length is 16 tokens, but the prompt has 17"),
        (0, 8, "the prompt is empty"),
    ],
)
@pytest.mark.parametrize("limit", [{"max_model_len": 16}, {"num_blocks": 4}], ids=str)
def test_a_request_that_can_never_run_ends_at_once(
    limit: dict[str, int], num_prompt: int, max_tokens: int, problem: str | None
) -> None:
    engine = FakeEngine(**limit)  # type: ignore[arg-type]
    engine.submit(request("a", prompt_of(num_prompt), max_tokens=max_tokens))
    engine.run()
    finished = engine.heard["a"].finished
    assert finished is not None
    assert finished.num_prompt == num_prompt
    if problem is None:
        assert (finished.reason, finished.error) == (FinishReason.LENGTH, None)
    else:
        assert finished.reason is FinishReason.ERROR
        assert problem in (finished.error or "")
        too_long = num_prompt >= 16
        assert finished.error_code is (ErrorCode.CONTEXT_LENGTH if too_long else ErrorCode.INVALID)
        assert finished.first_scheduled_time is None


def test_abort_all_ends_every_request_with_the_reason() -> None:
    engine = FakeEngine(max_num_seqs=1)
    engine.submit(*(request(name, prompt_of(5)) for name in "abc"))
    engine.step()
    ends = engine.scheduler.abort_all("the server ends", ErrorCode.STOPPING)
    assert [(end.request_id, end.reason, end.error, end.error_code) for end in ends] == [
        (name, FinishReason.ERROR, "the server ends", ErrorCode.STOPPING) for name in "abc"
    ]
    engine.scheduler.audit()
    plan = engine.scheduler.schedule()
    assert plan.rows == ()
    assert [engine.names[line] for line in plan.released] == ["a"]
    assert engine.scheduler.update(plan, execute(engine.executor, plan)) == []
    assert not engine.scheduler.has_work()


def test_times_are_taken_at_first_scheduling_and_at_the_first_token() -> None:
    engine = FakeEngine(max_num_batched_tokens=8, max_num_seqs=1)
    engine.submit(request("a", prompt_of(12), max_tokens=2), request("b", prompt_of(1)))
    for engine.now in (10.0, 11.0, 12.0):
        engine.step()
    engine.scheduler.abort("b")
    engine.run()
    a, b = engine.heard["a"].finished, engine.heard["b"].finished
    assert a is not None
    assert b is not None
    assert (a.first_scheduled_time, a.first_token_time) == (10.0, 11.0)
    assert (b.first_scheduled_time, b.first_token_time) == (None, None)


def test_a_request_for_no_tokens_has_no_first_token_time() -> None:
    engine = FakeEngine()
    engine.submit(request("a", prompt_of(5), max_tokens=0))
    engine.run()
    finished = engine.heard["a"].finished
    assert finished is not None
    assert (finished.num_output, finished.first_token_time) == (0, None)


def test_stats_count_the_present_and_the_past() -> None:
    engine = FakeEngine(num_blocks=10, max_num_seqs=1)
    engine.submit(request("a", prompt_of(9)), request("b", prompt_of(9)))
    engine.step()
    stats = engine.scheduler.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_steps) == (1, 1, 1)
    assert stats.last_step_tokens == 9
    assert stats.kv_usage == pytest.approx(0.3)
    engine.step()
    assert engine.scheduler.stats().last_step_tokens == 1
    engine.run()
    assert engine.scheduler.stats().last_step_tokens == 0  # the last plan only releases


PROMPTS = [prompt_of(11), prompt_of(17), [*prompt_of(11), 7, 8], [5], prompt_of(30, first=2000)]


@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize("num_blocks", [9, 12, 64])
@pytest.mark.parametrize("budget", [3, 4, 7, 16, 500])
def test_text_does_not_depend_on_budget_blocks_or_caching(
    budget: int, num_blocks: int, prefix_caching: bool
) -> None:
    engine = FakeEngine(
        num_blocks=num_blocks,
        prefix_caching=prefix_caching,
        max_num_seqs=3,
        max_num_batched_tokens=budget,
        max_model_len=36,
    )
    for index, prompt in enumerate(PROMPTS):
        engine.submit(request(f"r{index}", prompt, max_tokens=12, ignore_eos=False))
        engine.step()
    engine.run()  # compares every text with that of the request alone
