"""Where requests wait until their grammars are compiled, so that they delay no others."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import wait
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from engine.messages import ErrorCode, Submit
from engine.request import Request

if TYPE_CHECKING:
    from engine.grammar.grammars import Compiled, Grammars

NO_TOKENIZER = (
    "a grammar, allowed_token_ids or bad_words needs the model's tokenizer, and this model has none"
)

Problem = tuple[str, ErrorCode]


@dataclass(slots=True)
class _Waiting:
    message: Submit
    compiled: Compiled
    aborted: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Opened:
    """Requests for one prompt whose grammar is compiled, or why they cannot run; `aborted` are the
    ids of those that ended meanwhile."""

    message: Submit
    requests: list[Request]
    problem: Problem | None = None
    aborted: tuple[str, ...] = ()


class Gate:
    """Holds requests back until their grammars are ready; requests without one pass."""

    def __init__(self, grammars: Grammars | None) -> None:
        """`grammars`: None if the engine has no tokenizer."""
        self._grammars = grammars
        self._waiting: list[_Waiting] = []

    @property
    def busy(self) -> bool:
        """Whether a request waits."""
        return bool(self._waiting)

    @property
    def num_waiting(self) -> int:
        """Sequences that wait."""
        return sum(1 + len(each.message.others) for each in self._waiting)

    def take(self, message: Submit) -> Opened | None:
        """The requests of a message, if they need not wait."""
        params = message.request.params
        if not params.is_masked:
            return Opened(message, message.requests())
        if self._grammars is None:
            return Opened(message, message.requests(), (NO_TOKENIZER, ErrorCode.INVALID))
        grammar = params.grammar
        if grammar is None:
            requests = message.requests()
            for request in requests:
                self._grammars.open(request, None)
            return Opened(message, requests)
        self._waiting.append(_Waiting(message, self._grammars.ask(grammar)))
        return None

    def abort(self, request_id: str) -> bool:
        """Whether a request waits here; then it ends when its grammar is ready."""
        for waiting in self._waiting:
            if any(each.request_id == request_id for each in waiting.message.requests()):
                waiting.aborted.append(request_id)
                return True
        return False

    def forget_peer(self, peer: int) -> None:
        """No request is handed over to this engine."""
        for waiting in self._waiting:
            handover = waiting.message.handover
            if handover is not None and handover.peer == peer:
                waiting.message = msgspec.structs.replace(waiting.message, handover=None)

    def ready(self, at_most: float = 0.0) -> Iterator[Opened]:
        """Requests whose grammar is ready; first waits for one, no longer than so many seconds."""
        if self._waiting and at_most:
            wait([each.compiled for each in self._waiting], at_most, "FIRST_COMPLETED")
        ready = [each for each in self._waiting if each.compiled.done()]
        self._waiting = [each for each in self._waiting if each not in ready]
        return map(self._opened, ready)

    def all(self) -> Iterator[Opened]:
        """All requests that wait, ready or not, to be ended."""
        left, self._waiting = self._waiting, []
        return (
            Opened(each.message, each.message.requests(), None, tuple(each.aborted))
            for each in left
        )

    def _opened(self, waiting: _Waiting) -> Opened:
        message, requests = waiting.message, waiting.message.requests()
        assert self._grammars is not None
        try:
            compiled = waiting.compiled.result()
        except ValueError as error:
            return Opened(
                message, requests, (f"the grammar cannot be used: {error}", ErrorCode.INVALID)
            )
        for request in requests:
            self._grammars.open(request, compiled)
        return Opened(message, requests, None, tuple(waiting.aborted))
