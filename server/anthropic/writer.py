"""Writes a generation as a message, or as its events."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import pydantic_core
from msgspec import UNSET

from server.anthropic.bodies import (
    MessageEvent,
    MessageReply,
    MessageUsage,
    OutputBlock,
    StopReason,
    TextOutput,
    ThinkingOutput,
    ToolUse,
    error_of,
)
from server.anthropic.request import MessagesRequest
from server.http.errors import ApiError
from server.http.reply.sse import named_event
from server.openai.reply.bodies import SpeculationStats
from server.openai.reply.choice import ChoiceDelta
from server.openai.reply.generation import Generation
from server.openai.request.schema import ChatRequest
from server.text.answer.parts import CallArguments, CallBegin, Content, Part, Reasoning

INVALID = "INVALID_JSON"  # as Anthropic: the key of arguments that are no JSON object


class _Block:
    """A block of which the text comes in pieces. `kind` is the type of the part that it holds."""

    def __init__(self, kind: type[Part], name: str = "") -> None:
        self.kind = kind
        self._name = name
        self._id = f"toolu_{uuid.uuid4().hex[:24]}"
        self._texts: list[str] = []

    def whole(self) -> OutputBlock:
        text = "".join(self._texts)
        if self.kind is CallBegin:
            return ToolUse(id=self._id, name=self._name, input=_arguments(text))
        return ThinkingOutput(thinking=text) if self.kind is Reasoning else TextOutput(text=text)

    def more(self, text: str) -> dict[str, Any]:
        """The delta of further text."""
        self._texts.append(text)
        if self.kind is CallBegin:
            return {"type": "input_json_delta", "partial_json": text}
        if self.kind is Reasoning:
            return {"type": "thinking_delta", "thinking": text}
        return {"type": "text_delta", "text": text}


class MessageWriter:
    """Implements `Writer`: the only choice of a generation as one message."""

    def __init__(self, request: MessagesRequest, generation: Generation, _: ChatRequest) -> None:
        self._request = request
        self._generation = generation
        self._blocks: list[_Block] = []
        self._begun = False

    def events(self, delta: ChoiceDelta) -> bytes:
        head = b"" if self._begun else self._opening()
        self._begun = True
        return head + b"".join(map(_written, self._happenings(delta.parts)))

    def last_events(self) -> bytes:
        reason, sequence = self._stop()
        closing = MessageEvent(
            type="message_delta",
            delta={"stop_reason": reason, "stop_sequence": sequence},
            usage=self._usage(),
            speculation=self._speculation(),
        )
        last = [*self._close(), closing, MessageEvent(type="message_stop")]
        return b"".join(map(_written, last))

    def failure(self, error: ApiError) -> bytes:
        """The event of a message that cannot be finished."""
        return named_event("error", error_of(error))

    def add(self, delta: ChoiceDelta) -> None:
        for _ in self._happenings(delta.parts):
            pass

    def whole(self) -> MessageReply:
        reason, sequence = self._stop()
        return self._reply(
            content=[block.whole() for block in self._blocks],
            stop_reason=reason,
            stop_sequence=sequence,
            usage=self._usage(),
            speculation=self._speculation(),
        )

    def _reply(self, **fields: Any) -> MessageReply:
        return MessageReply(id=self._generation.id, model=self._generation.model, **fields)

    def _opening(self) -> bytes:
        tokens = self._generation.usage_so_far()
        usage = MessageUsage(
            input_tokens=tokens.prompt_tokens, cache_read_input_tokens=0, output_tokens=0
        )
        message = self._reply(content=[], stop_reason=None, stop_sequence=None, usage=usage)
        start = MessageEvent(type="message_start", message=message)
        return _written(start) + _written(MessageEvent(type="ping"))

    def _happenings(self, parts: Sequence[Part]) -> Iterator[MessageEvent]:
        for part in parts:
            match part:
                case CallBegin(name):
                    yield from self._begin(_Block(CallBegin, name))
                case Content(text) | Reasoning(text):
                    if not self._blocks or self._blocks[-1].kind is not type(part):
                        yield from self._begin(_Block(type(part)))
                    yield self._delta(self._blocks[-1].more(text))
                case CallArguments(text):
                    yield self._delta(self._blocks[-1].more(text))

    def _begin(self, block: _Block) -> Iterator[MessageEvent]:
        yield from self._close()
        shown = block.whole()
        self._blocks.append(block)
        yield self._event("content_block_start", content_block=shown)

    def _close(self) -> Iterator[MessageEvent]:
        if not self._blocks:
            return
        if self._blocks[-1].kind is Reasoning:
            yield self._delta({"type": "signature_delta", "signature": ""})
        yield self._event("content_block_stop")

    def _delta(self, delta: dict[str, Any]) -> MessageEvent:
        return self._event("content_block_delta", delta=delta)

    def _event(self, kind: str, **fields: Any) -> MessageEvent:
        """An event of the newest block."""
        return MessageEvent(type=kind, index=len(self._blocks) - 1, **fields)

    def _stop(self) -> tuple[StopReason, str | None]:
        """Why the message ended, and the stop sequence that ended it."""
        (choice,) = self._generation.choices
        if choice.ended() == "length":
            is_full = choice.request.params.max_tokens < self._request.max_tokens
            return "model_context_window_exceeded" if is_full else "max_tokens", None
        if choice.stop_string in (self._request.stop_sequences or ()):
            return "stop_sequence", choice.stop_string
        return "tool_use" if choice.has_called else "end_turn", None

    def _usage(self) -> MessageUsage:
        found = self._generation.usage()
        details = found.prompt_tokens_details
        cached = 0 if details is UNSET else details.cached_tokens
        return MessageUsage(
            input_tokens=found.prompt_tokens - cached,
            cache_read_input_tokens=cached,
            output_tokens=found.completion_tokens,
        )

    def _speculation(self) -> SpeculationStats | Any:
        asked = self._request.speculation
        return self._generation.draft_stats() if asked and asked.stats else UNSET


def _written(event: MessageEvent) -> bytes:
    return named_event(event.type, event)


def _arguments(text: str) -> dict[str, Any]:
    """The arguments of a call as an object: those that are complete, if a token limit cut them;
    the text itself, if it is no JSON object."""
    if not text:
        return {}
    try:
        found = pydantic_core.from_json(text, allow_inf_nan=False, allow_partial=True)
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {INVALID: text}
