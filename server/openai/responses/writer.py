"""Writes a generation as a response, or as its events."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from msgspec import UNSET

from server.http.errors import ApiError
from server.http.reply.sse import named_event
from server.openai.reply.bodies import ChatTokenLogprob
from server.openai.reply.choice import ChoiceDelta, ScoredToken
from server.openai.reply.generation import Generation
from server.openai.reply.logprobs import chat_logprobs
from server.openai.request.schema import ChatRequest
from server.openai.responses.bodies import (
    IncompleteDetails,
    InputTokensDetails,
    OutputTokensDetails,
    ResponseEvent,
    ResponseFailure,
    ResponseObject,
    ResponseUsage,
    Status,
)
from server.openai.responses.output import Happening, Output
from server.openai.responses.request import FunctionTool, ResponsesRequest
from server.text.answer.parts import CallBegin, Content

Keep = Callable[[ResponseObject], None]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a response says of its request, besides the chat request made of it."""

    request: ResponsesRequest
    is_stored: bool
    keep: Keep  # what has ended


class ResponseWriter:
    """Implements `Writer`: the only choice of a generation as one response."""

    def __init__(self, wanted: Wanted, generation: Generation, chat: ChatRequest) -> None:
        self._wanted = wanted
        self._generation = generation
        self._chat = chat
        self._output = Output()
        self._held: list[ScoredToken] = []  # of text that the reader holds back
        self._num_events = 0
        self.is_over = False  # whether its end was kept

    def begun(self, status: Status) -> ResponseObject:
        """The response before its end."""
        return self._object(status)

    def keep(self, response: ResponseObject) -> None:
        """Store a state of the response, if it is to be stored."""
        self._wanted.keep(response)

    def events(self, delta: ChoiceDelta) -> bytes:
        head = b"" if self._num_events else self._opening()
        return head + self._write(self._happenings(delta))

    def last_events(self) -> bytes:
        closing = self._write(self._closing())
        return closing + self._event(f"response.{self._ended}", {"response": self._finished()})

    def failure(self, error: ApiError) -> bytes:
        """The event of a response that cannot be finished."""
        return self._event("response.failed", {"response": self.failed(error)})

    def add(self, delta: ChoiceDelta) -> None:
        for _ in self._happenings(delta):
            pass

    def whole(self) -> ResponseObject:
        for _ in self._closing():
            pass
        return self._finished()

    def failed(self, error: ApiError) -> ResponseObject:
        """The response with the error that ended it, which is kept, too."""
        failure = ResponseFailure(
            code="invalid_prompt" if error.status == 400 else "server_error",
            message=error.detail.message,
        )
        return self._over(self._object("failed", error=failure))

    @property
    def _ended(self) -> Any:
        """`completed` or `incomplete`; the choice must have ended."""
        (choice,) = self._generation.choices
        return "incomplete" if choice.ended() == "length" else "completed"

    def _finished(self) -> ResponseObject:
        is_whole = self._ended == "completed"
        asked = self._wanted.request.speculation
        found = self._object(
            self._ended,
            completed_at=int(time.time()) if is_whole else None,
            incomplete_details=None if is_whole else IncompleteDetails(),
            usage=self._usage(),
            speculation=self._generation.draft_stats() if asked and asked.stats else UNSET,
        )
        return self._over(found)

    def _over(self, found: ResponseObject) -> ResponseObject:
        self.is_over = True
        self.keep(found)
        return found

    def _usage(self) -> ResponseUsage:
        found = self._generation.usage()
        prompt, completion = found.prompt_tokens_details, found.completion_tokens_details
        assert prompt is not UNSET
        assert completion is not UNSET
        return ResponseUsage(
            input_tokens=found.prompt_tokens,
            input_tokens_details=InputTokensDetails(cached_tokens=prompt.cached_tokens),
            output_tokens=found.completion_tokens,
            output_tokens_details=OutputTokensDetails(reasoning_tokens=completion.reasoning_tokens),
            total_tokens=found.total_tokens,
        )

    def _object(self, status: Status, **fields: Any) -> ResponseObject:
        request, chat, generation = self._wanted.request, self._chat, self._generation
        return ResponseObject(
            id=generation.id,
            created_at=generation.created,
            status=status,
            background=bool(request.background),
            instructions=request.instructions,
            max_output_tokens=request.max_output_tokens,
            metadata=request.metadata or {},
            model=generation.model,
            output=self._output.items(),
            parallel_tool_calls=request.parallel_tool_calls is not False,
            previous_response_id=request.previous_response_id,
            store=self._wanted.is_stored,
            temperature=1.0 if chat.temperature is None else chat.temperature,
            text={"format": {"type": "text"}, **_plain(request.text)},
            tool_choice=_plain(request.tool_choice) or "auto",
            tools=[_shown(tool) for tool in request.tools or ()],
            top_logprobs=request.top_logprobs or 0,
            top_p=1.0 if chat.top_p is None else chat.top_p,
            truncation=request.truncation or "disabled",
            **fields,
        )

    def _opening(self) -> bytes:
        begun = {"response": self.begun("in_progress")}
        return self._event("response.created", begun) + self._event("response.in_progress", begun)

    def _happenings(self, delta: ChoiceDelta) -> Iterable[Happening]:
        return self._output.add(delta.parts, self._scores(delta))

    def _closing(self) -> Iterable[Happening]:
        return self._output.end(self._ended, self._take_scores())

    def _scores(self, delta: ChoiceDelta) -> list[ChatTokenLogprob]:
        """Those of tokens after the reasoning, once their text is sent."""
        thought = self._generation.choices[delta.index].num_thought
        scored = (*self._held, *delta.scored)
        self._held = [each for each in scored if each.offset >= thought]
        is_sent = any(isinstance(part, Content | CallBegin) for part in delta.parts)
        return self._take_scores() if is_sent else []

    def _take_scores(self) -> list[ChatTokenLogprob]:
        held, self._held = self._held, []
        return chat_logprobs(self._generation.tokenizer, held)

    def _write(self, happenings: Iterable[Happening]) -> bytes:
        return b"".join([self._event(each.type, each.fields) for each in happenings])

    def _event(self, kind: str, fields: dict[str, Any]) -> bytes:
        number, self._num_events = self._num_events, self._num_events + 1
        return named_event(kind, ResponseEvent(type=kind, sequence_number=number, **fields))


def _plain(value: Any) -> Any:
    """A part of the request as the client wrote it."""
    if value is None or isinstance(value, str):
        return value or {}
    return value.model_dump(by_alias=True, exclude_none=True)


def _shown(tool: FunctionTool) -> dict[str, Any]:
    given: dict[str, Any] = _plain(tool)
    return {**dict.fromkeys(("parameters", "strict")), **given}
