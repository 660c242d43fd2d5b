"""Replaces the draft head of a running engine: loads on another thread, swaps between steps."""

from __future__ import annotations

import dataclasses
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future
from pathlib import Path

from drafter.source import resolve_draft
from engine.core import EngineCore
from engine.messages import DraftSwapped, SwapDraft
from engine.parallel.orders import Orders
from engine.runner.measuring import StepMeter
from server.assembly.drafting import Drafting, LoadedDraft
from server.assembly.ranks.rank import Rank

logger = logging.getLogger(__name__)
Loaded = tuple[LoadedDraft, Drafting]
DONE = object()  # after the last step was captured


class DraftSwapper:
    """Replaces the head of one engine. Requests keep running with the same text, the prefix cache
    stays, and entries missing for the new head read as zeros."""

    def __init__(
        self,
        core: EngineCore,
        rank: Rank,
        orders: Orders,
        scratch: Callable[[LoadedDraft], StepMeter],
    ) -> None:
        """
        Args:
            rank: rank 0.
            orders: to the other ranks.
            scratch: measures the head loaded last, in pages of its own.
        """
        self._core = core
        self._rank = rank
        self._orders = orders
        self._scratch = scratch

    def load(self, path: str | None) -> Loaded | None:
        """Read and check everything that `swap` needs; on one thread at a time.

        Raises:
            ValueError, OSError: there is no such head, or it does not fit the target, the
                configured trees or the free memory of a rank.
        """
        folder = resolve_draft(path, self._rank.config.model.source)
        if folder is None:
            return None
        self._rank.trees.shapes(self._rank.loader.facts(folder))
        return self._load_everywhere(folder)

    def _load_everywhere(self, folder: Path) -> Loaded:
        """All ranks load at the same time; if one fails, no rank keeps the head."""
        self._orders.load_draft(str(folder))
        try:
            loaded = self._rank.load_draft(folder)
        except BaseException:
            self._orders.failures()
            self._orders.drop_draft()
            raise
        if failures := self._orders.failures():
            self._orders.drop_draft()
            raise ValueError("; ".join(failures))
        return loaded

    def prepare_swap(self, loaded: Loaded | None) -> Generator[None, None, Drafting]:
        """Capture the steps with the loaded head on all ranks, one with each item, so that no
        request waits for them after the swap. Advance it between steps only. Returns what `swap`
        takes."""
        draft, drafting = loaded or (None, Drafting())
        steps = self._rank.prepare_swap(draft, drafting)
        while True:
            self._orders.prepare_draft(loaded=loaded is not None)
            if next(steps, DONE) is DONE:
                return drafting
            yield

    def drop(self) -> None:
        """Let the other ranks forget a head that was loaded and is not going to be used."""
        self._orders.drop_draft()

    def swap(self, loaded: Loaded | None, drafting: Drafting) -> None:
        """Draft with the loaded head from the next step on. Call it between steps only."""
        self._core.land()
        if loaded is not None:
            draft, _ = loaded
            planner, measuring = self._rank.trees.choose(
                draft, lambda: self._scratch(draft), at_once=False
            )
            drafting = dataclasses.replace(drafting, planner=planner, measuring=measuring)
        self._orders.use_draft(loaded=loaded is not None)
        self._rank.runner.draft_with(drafting.proposer)
        self._core.draft_with(drafting.policy(self._core.policy.lookup))
        logger.info("draft head in use: %s", drafting.facts and drafting.facts.path)


class DraftSwaps:
    """Requested swaps, done one after the other."""

    def __init__(
        self,
        core: EngineCore,
        swapper: DraftSwapper,
        timeout: float = math.inf,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`timeout`: seconds for a head to load; then the old one stays."""
        self._core = core
        self._swapper = swapper
        self._timeout = timeout
        self._clock = clock
        self._asked: deque[SwapDraft] = deque()
        self._loading: Future[Loaded | None] | None = None
        self._preparing: Generator[None, None, Drafting] | None = None
        self._began = 0.0
        self._given_up: Future[Loaded | None] | None = None  # its thread may still run

    @property
    def busy(self) -> bool:
        """Whether swaps are pending, so that `settle` must be called again soon."""
        return bool(self._asked)

    def ask(self, message: SwapDraft) -> None:
        self._asked.append(message)

    def settle(self) -> list[DraftSwapped]:
        """Call it between steps: captures one step of a head that has been loaded, swaps it in
        after the last, starts loading the next one, and returns the answers that are due."""
        answers = []
        if self._loading is not None and self._loading.done():
            answer = self._advance(self._asked[0], self._loading)
            if answer is not None:
                answers.append(answer)
                self._asked.popleft()
                self._loading = self._preparing = None
        elif self._loading is not None and self._clock() - self._began > self._timeout:
            reason = f"it did not load within {self._timeout:g} s (speculation.load_timeout)"
            answers.append(self._refuse(self._asked.popleft(), reason))
            self._given_up, self._loading = self._loading, None
        if self._given_up is not None and self._given_up.done():
            if self._given_up.exception() is None:
                self._swapper.drop()
            self._given_up = None
        if self._loading is None and self._asked:
            if self._given_up is None:
                self._start(self._asked[0].path)
            else:  # heads are loaded by one thread at a time
                reason = "an earlier head, which was given up, is still being loaded"
                answers.append(self._refuse(self._asked.popleft(), reason))
        return answers

    def _start(self, path: str | None) -> None:
        self._loading, self._began = Future(), self._clock()
        threading.Thread(target=self._load, args=(path, self._loading), daemon=True).start()

    def _load(self, path: str | None, loading: Future[Loaded | None]) -> None:
        try:
            loading.set_result(self._swapper.load(path))
        except Exception as error:  # noqa: BLE001  (files may be wrong in any way; serving continues)
            loading.set_exception(error)

    def _advance(self, message: SwapDraft, loading: Future[Loaded | None]) -> DraftSwapped | None:
        """None if there is more to capture."""
        error = loading.exception()
        if error is not None:
            return self._refused(message, error)
        if self._preparing is None:
            self._preparing = self._swapper.prepare_swap(loading.result())
        try:
            next(self._preparing)
        except StopIteration as end:
            self._swapper.swap(loading.result(), end.value)
            return DraftSwapped(message.request_id, self._core.info.draft)
        return None

    def _refused(self, message: SwapDraft, error: BaseException) -> DraftSwapped:
        if isinstance(error, ValueError | OSError):
            return self._refuse(message, str(error))
        return self._refuse(message, f"it cannot be loaded ({type(error).__name__})", error)

    def _refuse(
        self, message: SwapDraft, reason: str, error: BaseException | None = None
    ) -> DraftSwapped:
        logger.error("the draft head stays as it is: %s", reason, exc_info=error)
        return DraftSwapped(message.request_id, self._core.info.draft, reason)
