"""The items of one response while they come, and the events that tell of them."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from server.openai.reply.bodies import ChatTokenLogprob
from server.openai.reply.message import new_call_id
from server.openai.responses.bodies import (
    CallItem,
    ItemStatus,
    MessageItem,
    OutputItem,
    OutputText,
    ReasoningItem,
    ReasoningText,
)
from server.text.answer.parts import CallArguments, CallBegin, Content, Part, Reasoning


@dataclass(frozen=True, slots=True)
class Happening:
    """An event without what its stream adds to it."""

    type: str
    fields: dict[str, Any]


class _Item(Protocol):
    """An item whose text is not complete yet."""

    def item(self, status: ItemStatus) -> OutputItem: ...

    def opening(self) -> Iterator[Happening]: ...

    def more(self, text: str, scores: Sequence[ChatTokenLogprob], /) -> Happening: ...

    def closing(self) -> Iterator[Happening]: ...


class _Prose:
    """A message or reasoning, which has one part."""

    def __init__(self, is_reasoning: bool) -> None:
        self.is_reasoning = is_reasoning
        self._id = ("rs_" if is_reasoning else "msg_") + uuid.uuid4().hex
        self._texts: list[str] = []
        self._scores: list[ChatTokenLogprob] = []
        self._kind = f"response.{'reasoning_text' if is_reasoning else 'output_text'}"
        self._at = {"item_id": self._id, "content_index": 0}

    def item(self, status: ItemStatus) -> OutputItem:
        empty = status == "in_progress"
        if self.is_reasoning:
            thoughts = [] if empty else [ReasoningText(text=self._text)]
            return ReasoningItem(id=self._id, status=status, content=thoughts)
        content = [] if empty else [OutputText(text=self._text, logprobs=self._scores)]
        return MessageItem(id=self._id, status=status, content=content)

    def opening(self) -> Iterator[Happening]:
        yield Happening("response.content_part.added", self._at | {"part": self._part()})

    def more(self, text: str, scores: Sequence[ChatTokenLogprob]) -> Happening:
        self._texts.append(text)
        self._scores += scores
        return Happening(f"{self._kind}.delta", self._at | {"delta": text} | self._with(scores))

    def closing(self) -> Iterator[Happening]:
        text = {"text": self._text}
        yield Happening(f"{self._kind}.done", self._at | text | self._with(self._scores))
        yield Happening("response.content_part.done", self._at | {"part": self._part()})

    @property
    def _text(self) -> str:
        return "".join(self._texts)

    def _with(self, scores: Sequence[ChatTokenLogprob]) -> dict[str, Any]:
        return {} if self.is_reasoning else {"logprobs": list(scores)}

    def _part(self) -> OutputText | ReasoningText:
        if self.is_reasoning:
            return ReasoningText(text=self._text)
        return OutputText(text=self._text, logprobs=list(self._scores))


class _Call:
    """A call of a function."""

    def __init__(self, name: str) -> None:
        self._id = f"fc_{uuid.uuid4().hex}"
        self._call_id = new_call_id()
        self._name = name
        self._texts: list[str] = []

    def item(self, status: ItemStatus) -> OutputItem:
        return CallItem(
            id=self._id,
            status=status,
            call_id=self._call_id,
            name=self._name,
            arguments="".join(self._texts),
        )

    def opening(self) -> Iterator[Happening]:
        yield from ()

    def more(self, text: str, _: Sequence[ChatTokenLogprob]) -> Happening:
        self._texts.append(text)
        at = {"item_id": self._id, "delta": text}
        return Happening("response.function_call_arguments.delta", at)

    def closing(self) -> Iterator[Happening]:
        whole = {"item_id": self._id, "name": self._name, "arguments": "".join(self._texts)}
        yield Happening("response.function_call_arguments.done", whole)


class Output:
    """All items of a response. One is open at a time; a part of another kind closes it."""

    def __init__(self) -> None:
        self._items: list[OutputItem] = []
        self._open: _Item | None = None

    def items(self) -> list[OutputItem]:
        """Those so far; the last one may not be complete."""
        open_items = [] if self._open is None else [self._open.item("incomplete")]
        return [*self._items, *open_items]

    def add(self, parts: Sequence[Part], scores: Sequence[ChatTokenLogprob]) -> Iterator[Happening]:
        """Take new parts; scores belong to their first text."""
        left = list(scores)
        for part in parts:
            match part:
                case CallBegin(name):
                    yield from self._begin(_Call(name))
                case CallArguments(text):
                    yield self._more(text, ())
                case Reasoning(text):
                    yield from self._begin_prose(True)
                    yield self._more(text, ())
                case Content(text):
                    yield from self._begin_prose(False)
                    yield self._more(text, left)
                    left = []

    def end(
        self, status: ItemStatus, scores: Sequence[ChatTokenLogprob] = ()
    ) -> Iterator[Happening]:
        """Close what is open; scores belong to its text. A response without any text has an empty
        message."""
        if self._open is None and not self._items:
            yield from self._begin(_Prose(is_reasoning=False))
        if scores and isinstance(self._open, _Prose) and not self._open.is_reasoning:
            yield self._more("", scores)
        yield from self._close(status)

    def _more(self, text: str, scores: Sequence[ChatTokenLogprob]) -> Happening:
        assert self._open is not None
        return self._placed(self._open.more(text, scores))

    def _begin_prose(self, is_reasoning: bool) -> Iterator[Happening]:
        same = isinstance(self._open, _Prose) and self._open.is_reasoning == is_reasoning
        if not same:
            yield from self._begin(_Prose(is_reasoning))

    def _begin(self, item: _Item) -> Iterator[Happening]:
        yield from self._close("completed")
        self._open = item
        yield self._placed(
            Happening("response.output_item.added", {"item": item.item("in_progress")})
        )
        yield from map(self._placed, item.opening())

    def _close(self, status: ItemStatus) -> Iterator[Happening]:
        if self._open is None:
            return
        yield from map(self._placed, self._open.closing())
        done = self._open.item(status)
        yield self._placed(Happening("response.output_item.done", {"item": done}))
        self._items.append(done)
        self._open = None

    def _placed(self, event: Happening) -> Happening:
        return Happening(event.type, event.fields | {"output_index": len(self._items)})
