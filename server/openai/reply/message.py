"""The message of one choice: content, reasoning and calls, in one piece or as deltas."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence

from msgspec import UNSET

from server.openai.reply.bodies import (
    ChatDelta,
    ChatFinishReason,
    ChatLogprobs,
    ChatReply,
    ChatTokenLogprob,
    FinishReason,
    ReplyFunction,
    ReplyToolCall,
)
from server.text.answer.parts import CallArguments, CallBegin, Content, Part, Reasoning


def new_call_id() -> str:
    """The id of a call, by which its result names it."""
    return f"call_{uuid.uuid4().hex[:24]}"


class _Call:
    """One call, of which the arguments come in pieces."""

    def __init__(self, name: str) -> None:
        self.id = new_call_id()
        self.name = name
        self.arguments: list[str] = []

    def whole(self) -> ReplyToolCall:
        function = ReplyFunction(name=self.name, arguments="".join(self.arguments))
        return ReplyToolCall(id=self.id, type="function", function=function)

    def opening(self, index: int) -> ReplyToolCall:
        function = ReplyFunction(name=self.name, arguments="")
        return ReplyToolCall(index=index, id=self.id, type="function", function=function)


class Message:
    """Takes parts either by `add_parts`, for `whole`, or by `deltas`."""

    def __init__(self, scored: bool, called: ChatFinishReason, thoughts: bool = True) -> None:
        """`scored`: log-probabilities are wanted. `called`: the finish reason of calls. `thoughts`:
        reasoning is part of it."""
        self._scored = scored
        self._thoughts = thoughts
        self._called = called
        self._scores: list[ChatTokenLogprob] = []
        self._ids: list[int] = []
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[_Call] = []

    @property
    def has_scores(self) -> bool:
        """Whether log-probabilities wait to be taken."""
        return bool(self._scores)

    def add_tokens(self, scores: Sequence[ChatTokenLogprob], token_ids: Sequence[int]) -> None:
        self._scores += scores
        self._ids += token_ids

    def take_tokens(self) -> tuple[ChatLogprobs | None, list[int]]:
        """Log-probabilities and ids of the tokens since the last time."""
        scores, ids = self._scores, self._ids
        self._scores, self._ids = [], []
        return (ChatLogprobs(content=scores) if self._scored else None), ids

    def add_parts(self, parts: Sequence[Part]) -> None:
        for part in parts:
            match part:
                case Content(text):
                    self._content.append(text)
                case Reasoning(text):
                    self._reasoning.append(text if self._thoughts else "")
                case CallBegin(name):
                    self._calls.append(_Call(name))
                case CallArguments(text):
                    self._calls[-1].arguments.append(text)

    def whole(self) -> ChatReply:
        content, reasoning = "".join(self._content), "".join(self._reasoning)
        return ChatReply(
            content=content if content or not (self._calls or reasoning) else None,
            reasoning_content=reasoning or None,
            tool_calls=[call.whole() for call in self._calls] or UNSET,
        )

    def deltas(self, parts: Sequence[Part]) -> Iterator[ChatDelta]:
        """A delta for each part."""
        for part in parts:
            match part:
                case Content(text):
                    yield ChatDelta(content=text)
                case Reasoning(text) if self._thoughts:
                    yield ChatDelta(reasoning_content=text)
                case CallBegin(name):
                    self._calls.append(_Call(name))
                    yield ChatDelta(tool_calls=[self._calls[-1].opening(self._newest)])
                case CallArguments(text):
                    function = ReplyFunction(arguments=text)
                    yield ChatDelta(
                        tool_calls=[ReplyToolCall(index=self._newest, function=function)]
                    )

    def finish_reason(self, ended: FinishReason, has_called: bool) -> ChatFinishReason:
        """A cut by the token limit is told also where there are calls."""
        return self._called if has_called and ended == "stop" else ended

    @property
    def _newest(self) -> int:
        return len(self._calls) - 1
