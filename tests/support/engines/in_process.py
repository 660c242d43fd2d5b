"""Small engines in process, and what they generate."""

from __future__ import annotations

from collections.abc import Iterable

from engine.completion import Completion
from engine.core import EngineCore
from engine.messages import DraftSwapped, Finished, Submit, Tokens
from engine.request import Request, SamplingParams
from server.assembly.swaps import DraftSwaps
from tests.support.waiting import wait_until


def ask(request_id: str, prompt_ids: list[int], **params: object) -> Request:
    """A request with `max_tokens` 16 unless told otherwise."""
    sampling = SamplingParams(**({"max_tokens": 16, "temperature": 0.0} | params))  # type: ignore[arg-type]
    return Request(request_id=request_id, prompt_ids=prompt_ids, params=sampling)


def generate(
    core: EngineCore, requests: Iterable[Request], *, per_step: int | None = None
) -> dict[str, Completion]:
    """Submit all requests, `per_step` of them before each step; run until idle, always auditing."""
    waiting = list(requests)
    heard = {request.request_id: Completion() for request in waiting}
    while waiting or core.has_work():
        batch = waiting[: per_step or len(waiting)]
        del waiting[: len(batch)]
        for request in batch:
            core.add(Submit(request))
        for event in core.step():
            if isinstance(event, Tokens | Finished):
                heard[event.request_id].take(event)
        core.audit()
    assert all(record.finished is not None for record in heard.values())
    return heard


def settled(swaps: DraftSwaps) -> list[DraftSwapped]:
    """The next answers to swaps that were asked for, of an engine that does nothing else."""
    answers: list[DraftSwapped] = []
    wait_until(lambda: answers.extend(swaps.settle()) or answers)
    return answers
