"""The engine client of the HTTP process against a scripted peer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import msgspec
import pytest

from engine.messages import (
    Abort,
    DraftFacts,
    DraftSwapped,
    EngineFailed,
    EngineStats,
    Finished,
    Shutdown,
    Submit,
    SwapDraft,
    Tokens,
)
from engine.request import FinishReason, Request
from server.process.channel import client as client_module
from server.process.channel.client import ENGINE_LOST, NO_ENGINE, UNREAD
from server.process.channel.wire import decode_client
from tests.support.engines.engine_pair import Pair
from tests.support.engines.in_process import ask
from tests.support.engines.scripted_engine import finished, tokens
from tests.support.waiting import DEADLINE

STATS = EngineStats(1, 2, 0.5, 3, 4, 5, 6, 7)


Play = Callable[[Pair], Awaitable[None]]


@pytest.fixture
def play(tmp_path: Path) -> Callable[[Play], None]:
    """Runs a scene with a pair, then closes the pair."""

    def run(scene: Play) -> None:
        async def main() -> None:
            pair = Pair(tmp_path)
            try:
                await asyncio.wait_for(scene(pair), DEADLINE)
            finally:
                pair.close()

        asyncio.run(main())

    return run


def request(name: str) -> Request:
    return ask(name, [5, 6, 7])


async def collect(stream: AsyncIterator[Tokens | Finished]) -> list[Tokens | Finished]:
    return [event async for event in stream]


def test_streams_get_their_own_events_in_order(play: Callable[[Play], None]) -> None:
    async def scene(pair: Pair) -> None:
        peer = await pair.engine()
        a, b = request("a"), request("b")
        streams = [pair.client.submit(a), pair.client.submit(b)]
        assert await peer.hear(2) == [Submit(a), Submit(b)]
        of_a = [tokens(a, [1]), tokens(a, [2, 3]), finished(a, FinishReason.LENGTH, 3)]
        of_b = [tokens(b, [9]), finished(b, FinishReason.STOP, 1)]
        await peer.say(of_a[0], of_b[0], STATS)
        await peer.say(of_a[1], of_b[1], of_a[2])
        assert [await collect(stream) for stream in streams] == [of_a, of_b]
        assert pair.client.stats == STATS

    play(scene)


def test_a_request_is_submitted_before_its_stream_is_read(play: Callable[[Play], None]) -> None:
    async def scene(pair: Pair) -> None:
        peer = await pair.engine()
        pair.client.submit(request("a"))
        assert await peer.hear(1) == [Submit(request("a"))]

    play(scene)


def test_an_abort_is_passed_on_while_the_request_is_open(play: Callable[[Play], None]) -> None:
    async def scene(pair: Pair) -> None:
        peer = await pair.engine()
        a = request("a")
        stream = pair.client.submit(a)
        pair.client.abort("a")
        pair.client.abort("nobody")
        assert await peer.hear(2) == [Submit(a), Abort("a")]
        end = finished(a, FinishReason.ABORT)
        await peer.say(end)
        assert await collect(stream) == [end]
        pair.client.abort("a")  # it has ended: nothing is sent to the engine
        pair.client.shut_down()
        assert await peer.hear(1) == [Shutdown()]

    play(scene)


def test_a_lost_engine_ends_every_stream_with_one_error(play: Callable[[Play], None]) -> None:
    async def scene(pair: Pair) -> None:
        peer = await pair.engine()
        a, b = request("a"), request("b")
        of_a, of_b = pair.client.submit(a), pair.client.submit(b)
        await peer.hear(2)
        await peer.say(STATS, tokens(a, [1]))
        assert await anext(of_a) == tokens(a, [1])
        pair.client.detach()
        for name, stream in (("a", of_a), ("b", of_b)):
            (end,) = await collect(stream)
            assert isinstance(end, Finished)
            assert (end.request_id, end.reason) == (name, FinishReason.ERROR)
            assert (end.error, end.error_code) == (ENGINE_LOST, None)
            assert end.num_prompt == 3
        assert pair.client.info is None
        assert pair.client.stats == EngineStats(0, 0, 0.0, 3, 4, 5, 6, 0), "its counts are kept"

    play(scene)


def test_events_come_again_from_the_next_engine(play: Callable[[Play], None]) -> None:
    async def scene(pair: Pair) -> None:
        first = await pair.engine()
        lost = pair.client.submit(request("a"))
        pair.client.detach()
        first.close()
        await collect(lost)
        second = await pair.engine()
        b = request("b")
        stream = pair.client.submit(b)
        assert await second.hear(1) == [Submit(b)], "nothing meant for the first engine"
        events = [tokens(b, [4]), finished(b, FinishReason.LENGTH, 1)]
        await second.say(*events)
        assert await collect(stream) == events

    play(scene)


def test_an_engine_that_says_it_failed_gets_no_more_requests(
    play: Callable[[Play], None],
) -> None:
    async def scene(pair: Pair) -> None:
        peer = await pair.engine()
        a = request("a")
        stream = pair.client.submit(a)
        assert await peer.hear(1) == [Submit(a)]
        await peer.say(msgspec.structs.replace(STATS, draft_failed=True))
        await peer.say(EngineFailed())
        end = finished(a, FinishReason.ERROR, error="a step failed")
        await peer.say(end)
        assert await collect(stream) == [end]
        assert pair.client.info is None
        assert pair.client.has_failed
        assert pair.client.stats is not None
        stats = pair.client.stats
        assert (stats.num_running, stats.num_waiting, stats.draft_failed) == (0, 0, False)
        (refused,) = await collect(pair.client.submit(request("b")))
        assert isinstance(refused, Finished)
        assert refused.error == NO_ENGINE
        pair.client.detach()
        peer.close()
        peer = await pair.engine()
        assert not pair.client.has_failed
        assert pair.client.stats is None
        await peer.say(STATS)
        end = finished(request("c"), FinishReason.LENGTH)
        stream = pair.client.submit(request("c"))
        await peer.say(end)
        await collect(stream)
        both = pair.client.stats_so_far
        assert both is not None
        assert (both.num_running, both.num_waiting) == (STATS.num_running, STATS.num_waiting)
        assert (both.num_steps, both.prefix_hits) == (2 * STATS.num_steps, 2 * STATS.prefix_hits)
        peer.close()

    play(scene)


def test_without_an_engine_requests_end_at_once(play: Callable[[Play], None]) -> None:
    async def scene(pair: Pair) -> None:
        stream = pair.client.submit(request("a"))
        pair.client.abort("a")
        pair.client.shut_down()
        (end,) = await collect(stream)
        assert isinstance(end, Finished)
        assert (end.reason, end.error) == (FinishReason.ERROR, NO_ENGINE)

    play(scene)


def test_an_engine_that_sends_invalid_messages_is_told_to_end(
    play: Callable[[Play], None], caplog: pytest.LogCaptureFixture
) -> None:
    async def scene(pair: Pair) -> None:
        peer = await pair.engine()
        stream = pair.client.submit(request("a"))
        await peer.hear(1)
        await peer.say(tokens(request("stranger"), [1]))
        assert await peer.hear(1) == [Shutdown()]
        pair.client.detach()
        assert len(await collect(stream)) == 1

    play(scene)
    assert "unknown request stranger" in caplog.text


def test_messages_of_one_turn_are_sent_together(play: Callable[[Play], None]) -> None:
    async def scene(pair: Pair) -> None:
        peer = await pair.engine()
        for name in ("a", "b", "c"):
            pair.client.submit(request(name))
        frame = await peer._socket.recv()
        assert decode_client(frame) == [Submit(request(name)) for name in ("a", "b", "c")]

    play(scene)


def test_choices_of_one_request_are_one_message_with_one_prompt(
    play: Callable[[Play], None],
) -> None:
    async def scene(pair: Pair) -> None:
        peer = await pair.engine()
        prompt = list(range(100))
        choices = [
            msgspec.structs.replace(ask(f"a{n}", prompt, seed=n), choice=n) for n in range(60)
        ]
        single = ask("alone", list(prompt), seed=7)
        cooler = ask("cooler", single.prompt_ids, seed=7, temperature=0.5)
        for request in (*choices, single, cooler):
            pair.client.submit(request)
        first, second, third = decode_client(await peer._socket.recv())
        assert isinstance(first, Submit)
        assert first.requests() == choices
        assert len({id(request.prompt_ids) for request in first.requests()}) == 1
        assert [second, third] == [Submit(single), Submit(cooler)]

    play(scene)


FACTS = DraftFacts("/heads/new", "eagle3", 1, 32, 1000)


def test_swaps_get_their_own_answers_and_show_in_the_facts(play: Callable[[Play], None]) -> None:
    async def scene(pair: Pair) -> None:
        peer = await pair.engine()
        asked = [asyncio.create_task(pair.client.swap_draft(path)) for path in ("a", "b", None)]
        said = await peer.hear(3)
        assert all(isinstance(message, SwapDraft) for message in said)
        first, second, third = (message.request_id for message in said)  # type: ignore[union-attr]
        assert len({first, second, third}) == 3
        await peer.say(DraftSwapped(first, FACTS), DraftSwapped(second, FACTS, "no such head"))
        assert await asked[0] == DraftSwapped(first, FACTS)
        assert (await asked[1]).error == "no such head"
        assert pair.client.info is not None
        assert pair.client.info.draft == FACTS
        await peer.say(DraftSwapped(third))
        assert (await asked[2]).draft is None
        assert pair.client.info.draft is None

    play(scene)


def test_a_swap_of_an_engine_that_dies_fails(play: Callable[[Play], None]) -> None:
    async def scene(pair: Pair) -> None:
        with pytest.raises(ConnectionError, match=NO_ENGINE):
            await pair.client.swap_draft("a")
        peer = await pair.engine()
        asked = asyncio.create_task(pair.client.swap_draft("a"))
        await peer.hear(1)
        pair.client.detach()
        with pytest.raises(ConnectionError, match=ENGINE_LOST):
            await asked

    play(scene)


def test_an_answer_that_nothing_waits_for_is_harmless(play: Callable[[Play], None]) -> None:
    async def scene(pair: Pair) -> None:
        peer = await pair.engine()
        asked = asyncio.create_task(pair.client.swap_draft("a"))
        (message,) = await peer.hear(1)
        assert isinstance(message, SwapDraft)
        asked.cancel()
        again = asyncio.create_task(pair.client.swap_draft("b"))
        (second,) = await peer.hear(1)
        assert isinstance(second, SwapDraft)
        await peer.say(DraftSwapped(message.request_id, FACTS), DraftSwapped(second.request_id))
        assert (await again).request_id == second.request_id

    play(scene)


def test_a_request_whose_events_nobody_reads_is_aborted(
    play: Callable[[Play], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a client that reads slowly cannot fill the memory."""
    monkeypatch.setattr(client_module, "MAX_UNREAD", 2)

    async def scene(pair: Pair) -> None:
        peer = await pair.engine()
        a, b = request("a"), request("b")
        stream, other = pair.client.submit(a), pair.client.submit(b)
        assert await peer.hear(2) == [Submit(a), Submit(b)]
        await peer.say(*[tokens(a, [n]) for n in range(5)])
        assert await peer.hear(1) == [Abort("a")]
        await peer.say(
            tokens(a, [9]), finished(a, FinishReason.ABORT), finished(b, FinishReason.STOP)
        )
        await collect(other)
        (only,) = await collect(stream)
        assert isinstance(only, Finished)
        assert (only.reason, only.error) == (FinishReason.ERROR, UNREAD)

    play(scene)
