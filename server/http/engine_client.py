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
        """Facts of the engine when it is ready; None while it is loading or dead."""
        ...

    @property
    def stats(self) -> EngineStats | None:
        """The newest statistics, None before the first step. After the engine's death they keep its
        counts, and show nothing running or waiting."""
        ...

    @property
    def num_restarts(self) -> int:
        """Starts of the engine after the first."""
        ...

    def submit(self, request: Request) -> AsyncIterator[Tokens | Finished]:
        """Submit a request at once and stream its events; the last one is its `Finished`.

        If the engine dies or is not running, the stream ends with a `Finished` of reason ERROR.
        """
        ...

    def abort(self, request_id: str) -> None:
        """End a request; its stream still gets its `Finished`. Unknown ids are no error."""
        ...

    async def swap_draft(self, path: str | None) -> DraftSwapped:
        """Draft with the head in the directory `path`, or with none. The answer's error says why
        the old head stays. ConnectionError when the engine dies or is not running."""
        ...
