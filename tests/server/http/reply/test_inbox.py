"""Events of a request: read in order by one task, or taken past it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

import pytest

from engine.messages import Tokens
from engine.request import FinishReason
from server.http.reply.inbox import Event, Inbox
from tests.support.engines.in_process import ask
from tests.support.engines.scripted_engine import finished, tokens

REQUEST = ask("a", [5])
END = finished(REQUEST, FinishReason.LENGTH)


def said(*ids: int) -> list[Event]:
    return [tokens(REQUEST, [each]) for each in ids]


def read(*turns: Iterable[Event], shortcut: Callable[[Event], bool] | None = None) -> list[Event]:
    """What a reader gets, and what it raises; it runs after each of the turns."""

    async def main() -> list[Event]:
        inbox, found = Inbox(), list[Event]()
        inbox.shortcut = shortcut

        async def reader() -> None:
            async for event in inbox:
                found.append(event)

        reading = asyncio.create_task(reader())
        for turn in turns:
            for event in turn:
                inbox.put(event)
            for _ in range(3):
                await asyncio.sleep(0)
        await asyncio.wait_for(reading, 30)
        assert [event async for event in inbox] == [], "it is over"
        assert len(inbox) == 0
        return found

    return asyncio.run(main())


def test_events_are_read_in_order_to_the_last() -> None:
    for cut in range(5):
        events = [*said(1, 2, 3), END]
        assert read(events[:cut], events[cut:]) == events


def test_while_the_reader_waits_the_shortcut_takes_what_it_wants() -> None:
    taken: list[Event] = []

    def shortcut(event: Event) -> bool:
        wanted = isinstance(event, Tokens) and event.token_ids != [4]
        if wanted:
            taken.append(event)
        return wanted

    found = read(said(1), said(2, 3, 4, 5), said(6), [END], shortcut=shortcut)
    assert taken == said(2, 3, 6), "1 came before the reader waited, 5 after an unread event"
    assert found == [*said(1), *said(4, 5), END]


def test_what_the_shortcut_raises_is_raised_to_the_reader() -> None:
    def shortcut(event: Event) -> bool:
        raise RuntimeError(f"not {event}")

    with pytest.raises(RuntimeError, match="token_ids=\\[2\\]"):
        read([], said(2, 3), shortcut=shortcut)


def test_a_shortcut_may_put_an_event() -> None:
    """An engine in this process ends a request while it is told to abort it."""

    async def main() -> list[Event]:
        inbox = Inbox()

        def shortcut(event: Event) -> bool:
            if event is not END:
                inbox.put(END)
            return False

        inbox.shortcut = shortcut
        reading = asyncio.create_task(_all(inbox))
        await asyncio.sleep(0)
        inbox.put(said(1)[0])
        return await reading

    assert asyncio.run(main())[0] == END


async def _all(inbox: Inbox) -> list[Event]:
    return [event async for event in inbox]
