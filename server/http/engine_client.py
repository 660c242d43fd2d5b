"""The engine as the HTTP process sees it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

from engine.messages import DraftSwapped, EngineInfo, EngineStats, Finished, Tokens
from engine.request import Request


class EngineClient(Protocol):
    """Submits requests and streams their events. All methods run on the event loop's thread."""

    @property
    def info(self) -> EngineInfo | None:
        """Facts of the engine; None while it is loading or dead. The engine is ready when set."""
        ...

    @property
    def stats(self) -> EngineStats | None:
        """The newest statistics, None before the first step. Those of an engine that is gone keep
        its counts, and nothing in them runs or waits."""
        ...

    def submit(self, request: Request) -> AsyncIterator[Tokens | Finished]:
        """Hand a request over at once and stream its events; the last one is its `Finished`.

        An engine that dies, or is not there, ends the stream with a `Finished` of reason ERROR.
        """
        ...

    def abort(self, request_id: str) -> None:
        """End a request; its stream still gets its `Finished`. Unknown ids are no error."""
        ...

    async def swap_draft(self, path: str | None) -> DraftSwapped:
        """Draft with the head in the directory `path`, or without one; its error says why the old
        head stays. ConnectionError when the engine dies meanwhile, or is not there."""
        ...
