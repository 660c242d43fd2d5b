"""When blocks run out: which sequences wait, which are preempted, and how they resume."""

from __future__ import annotations

from tests.support.engines.fake_executor import FakeEngine, prompt_of, request, shape


def test_the_least_important_is_preempted_when_blocks_run_out_and_resumes_with_the_same_text() -> (
    None
):
    engine = FakeEngine(num_blocks=8)
    engine.submit(request("urgent", prompt_of(8), max_tokens=14))
    engine.submit(request("mild", prompt_of(8, first=2000), priority=1, max_tokens=14))
    plans = engine.run()
    urgent, mild = engine.heard["urgent"].finished, engine.heard["mild"].finished
    assert urgent is not None
    assert mild is not None
    assert (urgent.num_preemptions, mild.num_preemptions) == (0, 1)
    assert engine.scheduler.stats().num_preemptions == 1
    resumed = [a for plan in plans for a in plan.admitted if a.output_ids]
    assert [a.request.request_id for a in resumed] == ["mild"]


def test_a_preempted_sequence_gets_back_the_blocks_that_are_still_cached() -> None:
    engine = FakeEngine(num_blocks=8, max_model_len=32)
    engine.submit(request("urgent", prompt_of(8), max_tokens=10))
    engine.submit(request("mild", prompt_of(8, first=2000), priority=1, max_tokens=14))
    rows = [row for rows in engine.run_shapes() for row in rows]
    starts = [start for name, start, *_ in rows if name == "mild"]
    assert min(starts[1:]) > 0  # never again from the beginning
    assert engine.scheduler.stats().num_preemptions == 1
    finished = engine.heard["mild"].finished
    assert finished is not None
    assert finished.num_cached == 0  # only the first admission counts


def test_prompt_logprobs_are_sent_once_although_the_sequence_was_preempted() -> None:
    engine = FakeEngine(num_blocks=8)
    engine.submit(request("urgent", prompt_of(8), max_tokens=14))
    mild = request("mild", prompt_of(8, 2000), priority=1, max_tokens=14, prompt_logprobs=0)
    engine.submit(mild)
    engine.run()
    scores = engine.heard["mild"].prompt_logprobs
    assert engine.scheduler.stats().num_preemptions == 1
    assert scores[0] is None
    assert [score.token_id for score in scores[1:] if score is not None] == prompt_of(7, 2001)


def test_none_passes_the_first_in_the_queue_that_does_not_fit() -> None:
    engine = FakeEngine(num_blocks=8)
    engine.submit(request("running", prompt_of(16), max_tokens=3))
    engine.step()
    engine.submit(request("large", prompt_of(16, first=2000), max_tokens=1))
    engine.submit(request("small", prompt_of(2, first=3000), max_tokens=1))
    assert shape(engine.step(), engine.names) == [("running", 16, 1, True)]
    assert shape(engine.step(), engine.names) == [("running", 17, 1, True)]
    assert [name for name, *_ in shape(engine.step(), engine.names)] == ["large", "small"]
    engine.run()


def test_an_admission_leaves_every_running_sequence_a_block_to_grow() -> None:
    engine = FakeEngine(num_blocks=4)
    engine.submit(request("running", prompt_of(3), max_tokens=4))
    engine.step()
    engine.submit(request("large", prompt_of(12, first=2000), max_tokens=1))
    assert [len(plan.rows) for plan in engine.run()] == [1, 1, 1, 1]
    assert engine.scheduler.stats().num_preemptions == 0


def test_chunks_of_a_prompt_are_found_before_the_prompt_is_finished() -> None:
    engine = FakeEngine(max_num_batched_tokens=8)
    engine.submit(request("first", prompt_of(20), max_tokens=1))
    engine.submit(request("second", prompt_of(20), max_tokens=1))
    assert shape(engine.step(), engine.names) == [("first", 0, 8, False)]
    assert shape(engine.step(), engine.names) == [("first", 8, 8, False)]
    assert shape(engine.step(), engine.names) == [("first", 16, 4, True), ("second", 16, 4, True)]
    engine.run()
