"""Requests that were running at two deaths of the engine in a row."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import msgspec
import pytest

from engine.messages import EngineFailed, ErrorCode, Finished
from engine.request import Request, SamplingParams
from engine.step.executor import Launched
from engine.step.plan import Admission, StepOutcome, StepPlan
from server.assembly.running_requests import SIZE, Recorded, mark, marks_in
from server.process.channel import suspects as module
from server.process.channel.client import ZmqEngineClient
from server.process.channel.suspects import Suspects, hash_of
from tests.support.engines.in_process import ask
from tests.support.engines.scripted_engine import INFO

POISON, OTHER = ask("a", [5, 6]), ask("b", [7])


def again(request: Request, name: str = "again", seed: int = 7) -> Request:
    """The same request, sent once more."""
    params = msgspec.structs.replace(request.params, seed=seed)
    return msgspec.structs.replace(request, request_id=name, arrival_time=1.0, params=params)


@pytest.mark.parametrize(
    ("deaths", "refused"),
    [
        ([[POISON]], set()),
        ([[POISON], [again(POISON), OTHER]], {"a"}),
        ([[POISON, OTHER], [again(OTHER), again(POISON)]], {"a", "b"}),
        ([[POISON], [OTHER], [POISON]], set()),
        ([[POISON], [], [POISON]], set()),
        ([[POISON, again(POISON)]], set()),
    ],
    ids=["once", "twice", "both", "between", "idle-between", "two-at-once"],
)
def test_only_what_ran_at_two_deaths_in_a_row_is_refused(
    deaths: list[list[Request]], refused: set[str], caplog: pytest.LogCaptureFixture
) -> None:
    suspects = Suspects(60)
    with caplog.at_level(logging.ERROR):
        for running in deaths:
            suspects.engine_died(running)
    found = {one.request_id for one in (POISON, OTHER) if suspects.refusal(one)}
    assert found == refused
    assert [hash_of(one) in caplog.text for one in (POISON, OTHER)] == [
        one.request_id in refused for one in (POISON, OTHER)
    ]


def test_requests_are_known_again_by_what_they_compute_and_whose_they_are() -> None:
    same = [again(POISON), msgspec.structs.replace(POISON, choice=3, priority=1)]
    replace = msgspec.structs.replace
    others = [
        replace(POISON, prompt_ids=[5]),
        replace(POISON, client="x"),
        replace(POISON, cache_salt="x"),
        replace(POISON, params=SamplingParams(max_tokens=1, logit_bias={3: 1.0})),
    ]
    assert {hash_of(each) for each in same} == {hash_of(POISON)}
    assert len({hash_of(each) for each in [POISON, *others]}) == 5


def test_a_refusal_ends_after_its_time_and_memory_is_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    suspects = Suspects(60, lambda: now)
    monkeypatch.setattr(module, "MOST", 2)
    many = [ask(str(number), [number]) for number in range(3)]
    for running in (many, many):
        suspects.engine_died(running)
    assert [suspects.refusal(each) is not None for each in many] == [False, True, True]
    now = 59.0
    assert "for 1 s more" in str(suspects.refusal(many[1]))
    now = 60.0
    assert suspects.refusal(many[1]) is None
    never = Suspects(0)
    for running in (many, many):
        never.engine_died(running)
    assert never.refusal(many[0]) is None


class Idle:
    """An executor of plans without rows."""

    def launch(self, plan: StepPlan) -> Launched:
        return Launched(plan, StepOutcome)

    def collect(self, launched: Launched) -> StepOutcome:
        return launched.wait()


def test_the_record_names_what_holds_a_line_and_outlives_its_writer(tmp_path: Path) -> None:
    assert marks_in(tmp_path) == frozenset()
    recorded = Recorded(Idle(), tmp_path)
    recorded.launch(StepPlan(admitted=(Admission(1, POISON), Admission(0, OTHER))))
    assert marks_in(tmp_path) == {mark("a"), mark("b")}
    recorded.launch(StepPlan(admitted=(Admission(1, again(POISON)),), released=(1,)))
    assert marks_in(tmp_path) == {mark("again"), mark("b")}
    assert (tmp_path / "running").stat().st_size == 2 * SIZE


@pytest.mark.parametrize("says_so", [False, True], ids=["killed", "failed"])
def test_the_client_refuses_only_what_was_running(tmp_path: Path, says_so: bool) -> None:
    async def last(client: ZmqEngineClient, request: Request) -> Finished:
        stream = client.submit(request)
        await asyncio.sleep(0)
        if client.info is not None and not client._suspects.refusal(request):
            client.abort(request.request_id)
            client.detach()
        (end,) = [event async for event in stream]
        assert isinstance(end, Finished)
        return end

    async def main() -> None:
        client = ZmqEngineClient(Suspects(60))
        for number in range(2):
            client.attach(f"ipc://{tmp_path}/{number}")
            client._take(INFO)
            names = [f"{name}{number}" for name in "ab"]
            for request, name in zip((POISON, OTHER), names, strict=True):
                client.submit(again(request, name))
            if says_so:
                client._take(EngineFailed())
            client.suspect({mark(names[0])})
            client.detach()
        client.attach(f"ipc://{tmp_path}/again")
        client._take(INFO)
        end = await last(client, POISON)
        assert (end.error_code, "both times" in str(end.error)) == (ErrorCode.REFUSED, True)
        assert (await last(client, OTHER)).error_code is None
        client.close()

    asyncio.run(main())
