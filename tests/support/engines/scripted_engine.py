"""An engine client without an engine: it plays back the script of a test."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

import msgspec

from engine.messages import (
    DraftFacts,
    DraftSwapped,
    EngineInfo,
    EngineStats,
    ErrorCode,
    Finished,
    OperationBackend,
    Round,
    TokenLogprob,
    Tokens,
)
from engine.request import FinishReason, Request
from server.http.engine_client import StepSizes
from server.http.reply.inbox import Event, Inbox

Script = Callable[[Request], Sequence[Event]]
INFO = EngineInfo(
    vocab_size=384,
    max_model_len=64,
    num_blocks=32,
    block_size=16,
    hidden_size=4,
    eos_token_ids=[2],
    ops={"linear": OperationBackend("scripted")},
    device="none",
)


class ScriptedEngine:
    """Answers each request with the events of `script`. A script without a `Finished` leaves the
    request open: the test continues it with `feed`, or the front end aborts it."""

    def __init__(self, script: Script, info: EngineInfo | None = INFO) -> None:
        self.script = script
        self.info = info
        self.stats: EngineStats | None = None
        self.step_sizes = StepSizes()
        self.num_restarts = 0
        self.submitted: list[Request] = []
        self.aborted: list[str] = []
        self.swapped: list[str | None] = []  # paths
        self.swap_error: str | None = None
        self.dies_at_swap = False
        self._open: dict[str, Inbox] = {}

    @property
    def open_ids(self) -> list[str]:
        """Requests without a `Finished` so far."""
        return list(self._open)

    def submit(self, request: Request) -> AsyncIterator[Event]:
        assert all(request.request_id != known.request_id for known in self.submitted)
        self.submitted.append(request)
        inbox = self._open[request.request_id] = Inbox()
        for event in self.script(request):
            self.feed(event)
        return inbox

    def feed(self, event: Event) -> None:
        """Add one event."""
        self._open[event.request_id].put(event)
        if isinstance(event, Finished):
            del self._open[event.request_id]

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)
        if request_id in self._open:
            request = next(r for r in self.submitted if r.request_id == request_id)
            self.feed(finished(request, FinishReason.ABORT))

    async def swap_draft(self, path: str | None) -> DraftSwapped:
        self.swapped.append(path)
        if self.dies_at_swap:
            self.info = None
            raise ConnectionError("gone")
        facts = None if path is None else DraftFacts(path, "eagle3", 1, 32, 1000, (1, 4))
        return DraftSwapped("swap", facts, self.swap_error)


def finished(
    request: Request,
    reason: FinishReason,
    num_output: int = 0,
    error: str | None = None,
    code: ErrorCode | None = None,
) -> Finished:
    """The last event of a request."""
    return Finished(
        request_id=request.request_id,
        reason=reason,
        num_prompt=len(request.prompt_ids),
        num_output=num_output,
        num_cached=min(16, len(request.prompt_ids) - 1),
        first_scheduled_time=request.arrival_time + 0.25,
        first_token_time=request.arrival_time + 0.5,
        error=error,
        error_code=code,
    )


def score(token_id: int, count: int) -> TokenLogprob:
    """A made-up logprob: the token first, then its successors."""
    top = [(token_id + rank, -0.5 - rank) for rank in range(count)]
    return TokenLogprob(token_id, -0.5, top)


def tokens(request: Request, token_ids: Sequence[int], first: bool = False) -> Tokens:
    """New tokens, with the logprobs that the request asks for."""
    params = request.params
    logprobs = None
    if params.logprobs is not None:
        logprobs = [score(token_id, params.logprobs) for token_id in token_ids]
    scores: list[TokenLogprob | None] | None = None
    if first and params.prompt_logprobs is not None:
        rest = [score(token_id, params.prompt_logprobs) for token_id in request.prompt_ids[1:]]
        scores = [None, *rest]
    return Tokens(request.request_id, list(token_ids), logprobs, scores)


def say(token_ids: Sequence[int], step: int = 1, ends: bool = True) -> Script:
    """Emit these ids, `step` at a time, and end as the engine does: at the end token (2), at
    `max_tokens`, or after the last id. With `ends` False the request stays open."""

    def script(request: Request) -> list[Event]:
        kept = list(token_ids[: request.params.max_tokens])
        reason = FinishReason.LENGTH
        if 2 in kept and not request.params.ignore_eos:
            kept = kept[: kept.index(2) + 1]
            reason = FinishReason.STOP
        events: list[Event] = [
            tokens(request, kept[begin : begin + step], begin == 0)
            for begin in range(0, max(len(kept), 1), step)
        ]
        if ends:
            events.append(finished(request, reason, len(kept)))
        return events

    return script


def steps(*parts: tuple[Sequence[int], Round], ends: bool = True) -> Script:
    """Emit these ids step by step, each with its round if a trace is wanted. With `ends` False the
    request stays open."""

    def script(request: Request) -> list[Event]:
        events: list[Event] = [
            msgspec.structs.replace(tokens(request, ids), round=round if request.trace else None)
            for ids, round in parts
        ]
        count = sum(len(ids) for ids, _ in parts)
        return [*events, finished(request, FinishReason.STOP, count)] if ends else events

    return script


def drafting(
    script: Script, *counts: tuple[int, int, int], details: Sequence[Mapping[str, Any]] = ()
) -> Script:
    """`script` with speculation: `num_drafts`, `num_drafted` and `num_accepted` of each choice of
    the HTTP request, in order; `details`: more of what their ends say."""

    def drafted(request: Request) -> list[Event]:
        index = int(request.request_id.rpartition("-")[2])
        names = ("num_drafts", "num_drafted", "num_accepted")
        values: dict[str, Any] = dict(zip(names, counts[index], strict=True))
        values |= details[index] if details else {}
        return [
            msgspec.structs.replace(event, **values) if isinstance(event, Finished) else event
            for event in script(request)
        ]

    return drafted


def fail(token_ids: Sequence[int], error: str, code: ErrorCode | None = None) -> Script:
    """Emit these ids, then fail."""

    def script(request: Request) -> list[Event]:
        events: list[Event] = [tokens(request, [token_id]) for token_id in token_ids]
        events.append(finished(request, FinishReason.ERROR, len(token_ids), error, code))
        return events

    return script
