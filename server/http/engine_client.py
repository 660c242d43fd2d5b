"""The engine as the HTTP process sees it."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Protocol

from engine.messages import DraftSwapped, EngineInfo, EngineStats, Finished, Tokens
from engine.request import Request


class StepSizes:
    """How many tokens steps computed, of all engines of this process so far."""

    BOUNDS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)  # as in vLLM

    def __init__(self) -> None:
        self.num_tokens = 0
        self._counts = [0] * (len(self.BOUNDS) + 1)
        self._num_steps = 0

    def observe(self, stats: EngineStats) -> None:
        """Take the statistics after a step; those between steps change nothing."""
        if stats.num_steps != self._num_steps and stats.last_step_tokens:
            self.num_tokens += stats.last_step_tokens
            self._counts[bisect_left(self.BOUNDS, stats.last_step_tokens)] += 1
        self._num_steps = stats.num_steps

    @classmethod
    def together(cls, parts: Iterable[StepSizes]) -> StepSizes:
        """Those of several engines at once."""
        found = cls()
        for part in parts:
            found.num_tokens += part.num_tokens
            found._counts = [
                own + other for own, other in zip(found._counts, part._counts, strict=True)
            ]
        return found

    @property
    def counts(self) -> Sequence[int]:
        """Steps of at most so many tokens as each bound says, and more than the one before; then
        those above the last."""
        return self._counts


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
    def step_sizes(self) -> StepSizes:
        """Tokens of the steps so far."""
        ...

    @property
    def num_restarts(self) -> int:
        """Starts of the engine after the first."""
        ...

    def submit(self, request: Request) -> AsyncIterator[Tokens | Finished]:
        """Submit a request at once and stream its events; the last one is its `Finished`. The
        stream may be an `Inbox`.

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
