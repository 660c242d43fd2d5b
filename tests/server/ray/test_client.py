"""The engine client of a front end, without a cluster."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import pytest

with warnings.catch_warnings(action="ignore"):  # Ray uses what its libraries deprecate
    pytest.importorskip("ray.serve", reason="the extra `ray` is not installed")

from ray.exceptions import ActorDiedError, TaskCancelledError
from ray.serve.exceptions import DeploymentUnavailableError

from engine.messages import DraftFacts, DraftSwapped, EngineInfo, EngineStats, Finished, Tokens
from engine.request import FinishReason, Request, SamplingParams
from server.ray.client import RayEngineClient
from server.ray.messages import (
    EngineStatus,
    Head,
    decode_request,
    decode_route,
    encode,
)
from server.ray.scaling import EnginesForLoad, num_engines

pytestmark = pytest.mark.ray
INFO = EngineInfo(
    vocab_size=9,
    max_model_len=99,
    num_blocks=9,
    block_size=2,
    hidden_size=2,
    eos_token_ids=[1],
    ops={},
    device="cpu",
)
ASKED = Request(request_id="r", prompt_ids=[1, 2, 3, 4, 5], params=SamplingParams(max_tokens=3))
DONE = Finished("r", FinishReason.STOP, 5, 1)


def stats(**counts: Any) -> EngineStats:
    none: dict[str, Any] = dict.fromkeys(EngineStats.__struct_fields__[:8], 0)
    return EngineStats(**none | counts)


class FakeCall:
    """A response of a deployment."""

    def __init__(self, frames: list[Any]) -> None:
        self.frames = frames
        self.cancelled = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for frame in self.frames:
            await asyncio.sleep(0)
            if self.cancelled:
                raise TaskCancelledError
            if isinstance(frame, BaseException):
                raise frame
            yield frame

    def cancel(self) -> None:
        self.cancelled = True


class FakeEngines:
    """A handle of the engine's deployment."""

    def __init__(self, *frames: Any) -> None:
        self.frames = list(frames)
        self.calls: list[Any] = []
        self.failure: Exception | None = None
        self.answers: dict[str, Callable[..., list[Any]]] = {}
        self.generate = self.abort = self

    def options(self, **_: object) -> FakeEngines:
        return self

    def remote(self, *arguments: Any) -> FakeCall:
        self.calls.append(arguments)
        self.newest = FakeCall(self.frames)
        return self.newest

    def broadcast(self, method: str, *arguments: Any) -> FakeEngines:
        self.calls.append((method, *arguments))
        self._asked = self.answers[method](*arguments)
        return self

    async def results_async(self, **_: object) -> list[Any]:
        if self.failure is not None:
            raise self.failure
        return self._asked


def client_of(engines: FakeEngines, *statuses: EngineStatus) -> RayEngineClient:
    client = RayEngineClient(engines, 0.01)  # type: ignore[arg-type]
    client._take(statuses)
    return client


async def events(client: RayEngineClient, request: Request = ASKED) -> list[Tokens | Finished]:
    return [event async for event in client.submit(request)]


def test_events_of_an_engine_arrive_and_routes_have_chain_and_session() -> None:
    engines = FakeEngines(encode([]), encode([Tokens("r", [4])]), encode([DONE]))
    client = client_of(engines, EngineStatus("e", INFO, None, Head()))
    asked = Request(
        request_id="r", prompt_ids=[1, 2, 3, 4, 5], params=ASKED.params, client="c", session="s"
    )
    assert asyncio.run(events(client, asked)) == [Tokens("r", [4]), DONE]
    request, route = engines.calls[0]
    assert decode_request(request) == asked
    assert len(decode_route(route).chain) == 2
    assert decode_route(route).session == "c s"


@pytest.mark.parametrize("frames", [(ActorDiedError(),), (encode([]),)])
def test_a_lost_engine_ends_a_request_with_an_error(frames: tuple[Any, ...]) -> None:
    client = client_of(FakeEngines(encode([Tokens("r", [4])]), *frames))
    *_, last = asyncio.run(events(client))
    assert isinstance(last, Finished)
    assert last.reason is FinishReason.ERROR
    assert last.error == "the engine stopped unexpectedly"


def test_an_abort_goes_to_the_engine_once_it_has_the_request_and_cancels_before() -> None:
    async def aborted(*, begun: bool) -> tuple[FakeEngines, Finished]:
        engines = FakeEngines(encode([]), encode([Tokens("r", [4])]), encode([DONE]))
        client = client_of(engines)
        stream = client.submit(ASKED)
        if begun:
            await anext(stream)
        client.abort("r")
        client.abort("r")
        *_, last = [event async for event in stream]
        assert isinstance(last, Finished)
        return engines, last

    engines, last = asyncio.run(aborted(begun=True))
    assert last == DONE
    assert [call[0] for call in engines.calls[1:]] == ["r"]
    engines, last = asyncio.run(aborted(begun=False))
    assert last.reason is FinishReason.ABORT
    assert len(engines.calls) == 1


def test_a_cancelled_reader_stays_cancelled() -> None:
    async def read() -> None:
        engines = FakeEngines(*[encode([])] * 1000)
        client = client_of(engines)
        task = asyncio.create_task(events(client))
        while not engines.calls:
            await asyncio.sleep(0)
        client.abort("r")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(read())


def test_counts_of_an_ended_engine_are_kept_and_its_gauges_are_not() -> None:
    first = stats(num_running=2, kv_usage=0.5, num_steps=10, steps_by_tree={"a": 1})
    second = stats(
        num_running=1,
        kv_usage=0.25,
        num_steps=5,
        steps_by_tree={"b": 2},
        accepted_per_position=(3,),
    )
    client = client_of(FakeEngines())
    assert client.info is None
    assert client.stats is None
    client._take([EngineStatus("1", INFO, first, Head()), EngineStatus("2", INFO, second, Head())])
    both = client.stats
    assert both is not None
    assert (both.num_running, both.kv_usage, both.num_steps) == (3, 0.375, 15)
    assert (both.steps_by_tree, both.accepted_per_position) == ({"a": 1, "b": 2}, (3,))
    client._take([EngineStatus("2", INFO, second, Head())])
    one = client.stats
    assert one is not None
    assert (one.num_running, one.kv_usage, one.num_steps) == (1, 0.25, 15)


def test_a_slow_engine_does_not_close_the_others() -> None:
    engines = FakeEngines()
    engines.answers["status"] = lambda: [encode(EngineStatus("e", INFO, None, Head()))]
    client = client_of(engines)
    asyncio.run(client._look())
    assert client.info == INFO
    engines.failure = TimeoutError()
    asyncio.run(client._look())
    assert client.info == INFO
    engines.failure = DeploymentUnavailableError("engine")  # there is none
    asyncio.run(client._look())
    assert client.info is None


HEAD = DraftFacts("/new", "eagle3", 1, 9, 9)


def swap(*answers: Any) -> tuple[DraftSwapped, list[Any]]:
    """The answer to a swap that the engines answer so, and the paths that they were told."""
    engines = FakeEngines()
    engines.answers["draft_with"] = lambda *_: list(answers)
    engines.answers["status"] = list
    client = client_of(engines, EngineStatus("e", INFO, None, Head()))
    swapped = asyncio.run(client.swap_draft("/new"))
    return swapped, [call[2] for call in engines.calls if call[0] == "draft_with"]


def test_a_head_is_swapped_in_all_engines_or_in_none() -> None:
    good = encode(DraftSwapped("", HEAD))
    bad = encode(DraftSwapped("", error="no memory"))
    assert swap(good, good) == (DraftSwapped("", HEAD), ["/new"])
    assert swap(good, ActorDiedError()) == (DraftSwapped("", HEAD), ["/new"])
    assert swap(bad, bad) == (DraftSwapped("", error="no memory"), ["/new"])
    assert swap(good, bad) == (DraftSwapped("", error="no memory"), ["/new", None])


def test_an_engine_that_starts_later_is_told_the_head() -> None:
    async def told() -> list[Any]:
        engines = FakeEngines()
        engines.answers["draft_with"] = lambda *_: [encode(DraftSwapped("", HEAD))]
        client = client_of(engines)
        old, new = Head(), Head(5.0, "/new")
        client._take([EngineStatus("1", INFO, None, new), EngineStatus("2", INFO, None, old)])
        pushing = client._pushing
        assert pushing is not None
        await pushing
        client._take([EngineStatus("1", INFO, None, new), EngineStatus("2", INFO, None, new)])
        assert client._pushing is pushing
        return engines.calls

    assert asyncio.run(told()) == [("draft_with", 5.0, "/new")]


@pytest.mark.parametrize(
    ("current", "waiting", "used", "wanted"),
    [
        (1, 0, [0.1], 1),
        (1, 0, [0.8], 1),
        (1, 8, [0.8], 2),
        (1, 20, [1.0], 4),
        (2, 0, [0.3, 0.3], 1),
        (2, 0, [1.0, 0.6], 2),
        (4, 0, [0.1], 1),
    ],
)
def test_the_load_says_how_many_engines(
    current: int, waiting: float, used: list[float], wanted: int
) -> None:
    assert num_engines(current, waiting, used, 8.0, 0.8) == wanted


def test_engines_stay_while_nobody_tells_the_load() -> None:
    context = SimpleNamespace(aggregated_metrics={}, current_num_replicas=1, target_num_replicas=3)
    assert EnginesForLoad(8.0, 0.8)(context) == (3, {})
